"""LoRA files of any program, read into one form: two matrices and alpha for each layer of the transformer.

:mod:`cogtune.run.lora_paths` finds files, :mod:`.lora_file` gets tensors out of them, :mod:`.names` knows what programs
call them, :mod:`.reading` makes a :class:`Lora` of both, :mod:`.applying` puts one into a model and looks afterwards
whether it is there.
"""

from cogtune.modeling.lora_files.applying import add_all, add_to, check_applied, scale_all, start_from
from cogtune.modeling.lora_files.init_lora import describe_init, initial_lora, with_init_lora
from cogtune.modeling.lora_files.reading import Lora, Pair, check_fits, fitting_models, read_lora

__all__ = [
    "Lora",
    "Pair",
    "add_all",
    "add_to",
    "check_applied",
    "check_fits",
    "describe_init",
    "fitting_models",
    "initial_lora",
    "read_lora",
    "scale_all",
    "start_from",
    "with_init_lora",
]
