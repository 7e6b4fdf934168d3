# The public names and their modules. `__init__.py` reads this list, so that no name stands twice.
from .arch.per_layer import disable_heterogeneous as disable_heterogeneous
from .arch.per_layer import enable_heterogeneous as enable_heterogeneous
from .config.domains import DomainConfig as DomainConfig
from .config.pruning import RunOptions as RunOptions
from .config.pruning import StructPruneConfig as StructPruneConfig
from .config.recovery import RecoveryConfig as RecoveryConfig
from .criteria import register_criterion as register_criterion
from .distillation.attach import attach_teacher as attach_teacher
from .distillation.teacher_file_writer import write_teacher as write_teacher
from .distillation.teacher_file_writer import write_teacher_rows as write_teacher_rows
from .domains.manifest import Manifest as Manifest
from .evaluation.evaluate import Evaluation as Evaluation
from .evaluation.evaluate import evaluate as evaluate
from .evaluation.speed import Speed as Speed
from .evaluation.speed import measure_speed as measure_speed
from .measure.losses import perplexity as perplexity
from .method.offloaded import layer_device_map as layer_device_map
from .method.plan import Plan as Plan
from .pruner import PruneResult as PruneResult
from .pruner import StructPruner as StructPruner
from .pruner import prune as prune
from .pruner import prune_model as prune_model
from .pruning.dryrun import DryRun as DryRun
from .pruning.dryrun import dry_run as dry_run
from .recovery.recover import Recovery as Recovery
from .recovery.recover import recover as recover
from .saving.export import export_uniform as export_uniform
from .saving.gguf_file import export_gguf as export_gguf
from .saving.page import write_report as write_report
from .system.errors import InPlaceError as InPlaceError
from .system.errors import StructPruneError as StructPruneError
from .system.processes import across_processes as across_processes
from .trainer import StructPruneCallback as StructPruneCallback
from .trainer import attach_pruner as attach_pruner

__version__: str
