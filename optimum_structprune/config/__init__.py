"""What a run is asked to do: strict dataclasses of plain values. It imports only errors and the registry."""
