"""Samplers by name: the schedulers, of this package or of diffusers, that a checkpoint can be sampled with."""

from typing import TYPE_CHECKING

from .errors import UserError, refusals, unknown


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


# name -> the name of its class, in this package or in diffusers, and its options
BETA_SCHEDULERS = {
    "ddim": ("TinyDDIMScheduler", {}),
    "ddpm": ("TinyDDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm_single": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "sa": ("SASolverScheduler", {}),
    "sde_dpm": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
# the same for each objective of a network
SCHEDULERS = {
    "betas": BETA_SCHEDULERS,
    "flow": {
        "euler": ("TinyFlowMatchScheduler", {"solver": "euler"}),
        "heun": ("TinyFlowMatchScheduler", {"solver": "heun"}),
        "multistep": ("TinyFlowMatchScheduler", {"solver": "multistep"}),
        **{name: BETA_SCHEDULERS[name] for name in ("deis", "dpm", "dpm_single", "sa", "sde_dpm", "unipc")},
    },
    "edm": {
        "dpm": ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        "euler": ("TinyEDMScheduler", {"solver": "euler"}),
        "heun": ("TinyEDMScheduler", {"solver": "heun"}),
        "multistep": ("TinyEDMScheduler", {"solver": "multistep"}),
        "sde_dpm": ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    },
}

SCHEDULER_NAMES = sorted({name for schedulers in SCHEDULERS.values() for name in schedulers})


def check_scheduler_name(name: str) -> None:
    """Checks that a name is one of those above; before anything is loaded."""
    if name not in SCHEDULER_NAMES:
        raise unknown("--scheduler", name, SCHEDULER_NAMES)


def use_scheduler(pipe: "DiffusionPipeline", name: str, checkpoint: str) -> None:
    """
    Puts a scheduler into a pipeline, with the config of the one that it has.

    Raises:
        UserError: If the pipeline, which was loaded from `checkpoint`, has none, or if there is no form of it for the
            pipeline's objective.
    """
    import diffusers

    import tiny_diffusers

    from .pipelines.pipeline_tiny import check_scheduler, objective_of

    check_scheduler_name(name)
    if "scheduler" not in pipe.components:
        raise UserError(f"--scheduler means nothing to '{checkpoint}', a {type(pipe).__name__}: leave it out.")
    objective = objective_of(pipe.scheduler)
    fitting = SCHEDULERS[objective]
    if name not in fitting:
        raise UserError(
            f"--scheduler {name} has no form for {objective}, which '{checkpoint}' was trained for: give one of "
            f"{', '.join(fitting)}."
        )
    class_name, options = fitting[name]
    scheduler_class = getattr(tiny_diffusers if class_name.startswith("Tiny") else diffusers, class_name)
    with refusals():
        check_scheduler(pipe.scheduler, objective)  # whose config the other one takes
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **options)
