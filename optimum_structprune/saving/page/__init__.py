"""The report of a result as one HTML page, from the records that lie beside the model."""
