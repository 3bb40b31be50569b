"""Fine-tune vision models with fastai's workflow at the speed of the hardware.

Every name here is bound when it is first asked for, so that `import thawline` costs nothing.
"""

from typing import TYPE_CHECKING

from thawline.late import late

__version__ = "0.1.0"

if TYPE_CHECKING:
    from thawline.cluster.job.job import Job
    from thawline.cluster.run.run import run
    from thawline.cluster.serve.predictor import Prediction, Predictor, load
    from thawline.dataio import (
        ArrayLoader,
        Batch,
        DataError,
        ImageLoader,
        ImageSpec,
        Loader,
        Manifest,
        Mix,
        Table,
        array_loaders,
        by_column,
        by_folder,
        by_function,
        by_parent,
        by_regex,
        choose_engine,
        explain,
        from_csv,
        from_file,
        from_folder,
        from_lists,
        from_table,
        hold_out,
        k_fold,
        label,
        loaders,
        mask_path,
        numbers_by_columns,
        pack,
        points_by_columns,
        points_by_function,
        random_split,
        render,
        show_batch,
        split,
        split_loader,
        stratified,
    )
    from thawline.models import (
        Bundle,
        BundleError,
        Classifier,
        CodeError,
        ModelError,
        UnknownModelError,
        WeightsError,
        add_lora,
        as_body,
        create,
        freeze,
        freeze_to,
        layer_groups,
        normalisation,
        parameter_groups,
        unfreeze,
    )
    from thawline.trainer import (
        Best,
        Find,
        Learner,
        LocalContext,
        LrCurve,
        OneCycle,
        OptimSettings,
        Phase,
        Predictions,
        RunContext,
        Stopping,
        TrainError,
        diagnose,
        lr_find,
        spread,
        sweep,
    )

__getattr__ = late(
    __name__,
    {
        "thawline.cluster.job.job": "Job",
        "thawline.cluster.run.run": "run",
        "thawline.cluster.serve.predictor": "Prediction Predictor load",
        "thawline.dataio": (
            "ArrayLoader Batch DataError ImageLoader ImageSpec Loader Manifest Mix Table "
            "array_loaders by_column by_folder "
            "by_function by_parent by_regex choose_engine explain from_csv from_file from_folder "
            "from_lists from_table hold_out k_fold label loaders mask_path numbers_by_columns pack points_by_columns "
            "points_by_function random_split render show_batch split split_loader stratified"
        ),
        "thawline.models": (
            "Bundle BundleError Classifier CodeError ModelError UnknownModelError WeightsError add_lora as_body create "
            "freeze freeze_to layer_groups normalisation parameter_groups unfreeze"
        ),
        "thawline.trainer": (
            "Best Find Learner LocalContext LrCurve OneCycle OptimSettings Phase Predictions RunContext "
            "Stopping TrainError diagnose lr_find spread sweep"
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
    "CodeError",
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
    "Prediction",
    "Predictions",
    "Predictor",
    "RunContext",
    "Stopping",
    "Table",
    "TrainError",
    "UnknownModelError",
    "WeightsError",
    "add_lora",
    "array_loaders",
    "as_body",
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
    "load",
    "loaders",
    "lr_find",
    "mask_path",
    "normalisation",
    "numbers_by_columns",
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
