"""Tasks of the papers: sources of batches with their losses and errors; and curricula over their lessons."""

from fastmem.tasks._task import Batch, RegressionTask, Task, TokenTask, bit_errors, masked_loss, soft_bit_errors
from fastmem.tasks.associative_recall import AssociativeRecall
from fastmem.tasks.continual import CONTINUAL, Continual, Padded, Phase, phases
from fastmem.tasks.copy import Copy, LongCopy
from fastmem.tasks.csordas import BlockCopy, BlockRecall, KeyValue
from fastmem.tasks.curriculum import Curriculum, LookBack, Naive, Phases, PredictionGain, Uniform
from fastmem.tasks.dynamic_ngrams import DynamicNGrams
from fastmem.tasks.few_shot import FewShot, FewShotDigits, FewShotImages
from fastmem.tasks.flattened_digits import FlattenedDigits
from fastmem.tasks.priority_sort import PrioritySort
from fastmem.tasks.repeat_copy import RepeatCopy
from fastmem.tasks.sequencing import Sequencing
from fastmem.tasks.sinusoid import Sinusoid
from fastmem.tasks.token_sequence import TokenSequence

__all__ = [
    "CONTINUAL",
    "AssociativeRecall",
    "Batch",
    "BlockCopy",
    "BlockRecall",
    "Continual",
    "Copy",
    "Curriculum",
    "DynamicNGrams",
    "FewShot",
    "FewShotDigits",
    "FewShotImages",
    "FlattenedDigits",
    "KeyValue",
    "LongCopy",
    "LookBack",
    "Naive",
    "Padded",
    "Phase",
    "Phases",
    "PredictionGain",
    "PrioritySort",
    "RegressionTask",
    "RepeatCopy",
    "Sequencing",
    "Sinusoid",
    "Task",
    "TokenSequence",
    "TokenTask",
    "Uniform",
    "bit_errors",
    "masked_loss",
    "phases",
    "soft_bit_errors",
]
