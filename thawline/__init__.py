"""Fine-tune vision models with fastai's workflow at the speed of the hardware.

Every name here is bound when it is first asked for, so that `import thawline` costs nothing.
"""

from typing import TYPE_CHECKING

from thawline.late import late

__version__ = "0.1.0"

if TYPE_CHECKING:
    from thawline.cluster.job.job import Job
    from thawline.cluster.run.run import run
    from thawline.dataio.batch import Batch, Loader
    from thawline.dataio.errors import DataError
    from thawline.dataio.pixels.spec import ImageSpec
    from thawline.dataio.reading.packing import pack
    from thawline.dataio.show import explain, show_batch
    from thawline.dataio.stream.arrays import ArrayLoader, array_loaders
    from thawline.dataio.stream.loader import ImageLoader, loaders, split_loader
    from thawline.dataio.stream.mix import Mix
    from thawline.dataio.stream.render import render
    from thawline.dataio.stream.renderer import choose_engine
    from thawline.dataio.table.draws import k_fold, random_split, stratified
    from thawline.dataio.table.labels import (
        by_column,
        by_function,
        by_parent,
        by_regex,
        from_lists,
        label,
        mask_path,
        points_by_columns,
        points_by_function,
    )
    from thawline.dataio.table.manifest import Manifest
    from thawline.dataio.table.sources import Table, from_csv, from_file, from_folder, from_table
    from thawline.dataio.table.splits import by_folder, hold_out, split
    from thawline.models.bodies import Classifier, create, normalisation
    from thawline.models.bundle import Bundle
    from thawline.models.errors import BundleError, ModelError, UnknownModelError, WeightsError
    from thawline.models.groups import freeze, freeze_to, layer_groups, parameter_groups, unfreeze
    from thawline.trainer.analysis.diagnosis import diagnose
    from thawline.trainer.analysis.thresholds import sweep
    from thawline.trainer.checkpoints.checkpoint import Best
    from thawline.trainer.context import LocalContext, RunContext
    from thawline.trainer.errors import TrainError
    from thawline.trainer.learner import Learner
    from thawline.trainer.lr_finder import LrCurve, lr_find
    from thawline.trainer.metrics.predictions import Predictions
    from thawline.trainer.optim_settings import OptimSettings
    from thawline.trainer.schedule.phases import Find, Phase
    from thawline.trainer.schedule.shapes import OneCycle, spread

__getattr__ = late(
    __name__,
    {
        "thawline.cluster.job.job": "Job",
        "thawline.cluster.run.run": "run",
        "thawline.dataio": (
            "ArrayLoader Batch DataError ImageLoader ImageSpec Loader Manifest Mix Table "
            "array_loaders by_column by_folder "
            "by_function by_parent by_regex choose_engine explain from_csv from_file from_folder "
            "from_lists from_table hold_out k_fold label loaders mask_path pack points_by_columns "
            "points_by_function random_split render show_batch split split_loader stratified"
        ),
        "thawline.models": (
            "Bundle BundleError Classifier ModelError UnknownModelError WeightsError create freeze freeze_to "
            "layer_groups normalisation parameter_groups unfreeze"
        ),
        "thawline.trainer": (
            "Best Find Learner LocalContext LrCurve OneCycle OptimSettings Phase Predictions RunContext "
            "TrainError diagnose lr_find spread sweep"
        ),
    },
)

__all__ = [
    "ArrayLoader",
    "Batch",
    "Best",
    "Bundle",
    "BundleError",
    "Classifier",
    "DataError",
    "Find",
    "ImageLoader",
    "ImageSpec",
    "Job",
    "Learner",
    "Loader",
    "LocalContext",
    "LrCurve",
    "Manifest",
    "Mix",
    "ModelError",
    "OneCycle",
    "OptimSettings",
    "Phase",
    "Predictions",
    "RunContext",
    "Table",
    "TrainError",
    "UnknownModelError",
    "WeightsError",
    "array_loaders",
    "by_column",
    "by_folder",
    "by_function",
    "by_parent",
    "by_regex",
    "choose_engine",
    "create",
    "diagnose",
    "explain",
    "freeze",
    "freeze_to",
    "from_csv",
    "from_file",
    "from_folder",
    "from_lists",
    "from_table",
    "hold_out",
    "k_fold",
    "label",
    "layer_groups",
    "loaders",
    "lr_find",
    "mask_path",
    "normalisation",
    "pack",
    "parameter_groups",
    "points_by_columns",
    "points_by_function",
    "random_split",
    "render",
    "run",
    "show_batch",
    "split",
    "split_loader",
    "spread",
    "stratified",
    "sweep",
    "unfreeze",
]
