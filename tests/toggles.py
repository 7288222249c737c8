"""Every toggle of the method as overrides of a tiny arm: one place for the tests that hold for all of them."""

from __future__ import annotations

OFF = {name: f"losses.{name}.enabled=false" for name in ("rsd", "rel", "attn", "spectral")}
ON = {name: f"losses.{name}.enabled=true" for name in ("logit", "feature")}

# name → overrides; where an option makes sense beside another only, both are given
TOGGLES: dict[str, tuple[str, ...]] = {
    "basd": (),
    **{
        f"method={name}": (f"method={name}",)
        for name in ("basd_literal", "kd", "deit_soft", "deit_hard", "rsd", "barlow")
    },
    **{f"method={name}": (f"method={name}",) for name in ("vrm", "spectralkd", "a2d", "alp_kd", "layer_matching")},
    # every loss from the first step on
    "method=basd_literal,warmup=none": ("method=basd_literal", "warmup=none"),
    "method=feature_projection": ("method=feature_projection",),
    "method=ce": ("method=ce",),
    # student, views, mixing
    "student.points=1": ("student.points=1",),
    "student.points=all": ("student.points=3",),
    "student.points=[0,2]": ("student.points=[0,2]",),
    "views=single": ("views=single",),
    "views.geometry=independent": ("views.geometry=independent",),
    "views.strong=randaugment_full": ("views.strong=randaugment_full",),
    "views.strong=three_augment": ("views.strong=three_augment",),
    **{f"mixing={name}": (f"mixing={name}",) for name in ("mixup", "cutmix", "none")},
    "mixing.targets=clean": ("mixing.targets=clean",),
    "mixing.targets=same_input": ("mixing.targets=same_input",),
    "mixing.targets=skip": ("mixing.targets=skip", "mixing.probability=0.5"),
    "mixing.probability=0.5": ("mixing.probability=0.5",),
    # selector
    **{
        f"selector={name}": (f"selector={name}",)
        for name in (
            "static",
            "alp",
            "uniform",
            "forward",
            "reverse",
            "random",
            "all_to_one",
            "last",
            "spectral_similarity",
        )
    },
    "selector.entropy=spread": ("selector.entropy=spread",),
    "selector.entropy=none": ("selector.entropy=none",),
    "selector.temperature=0.5": ("selector.temperature=0.5",),
    # aligners
    **{
        f"token_aligner={name}": (f"token_aligner={name}",)
        for name in ("interpolate", "student_projection", "frozen_random")
    },
    "token_aligner.values=projected": ("token_aligner.values=projected",),
    "token_aligner.gradient=detached": ("token_aligner.gradient=detached",),
    "token_aligner.values=projected,detached": ("token_aligner.values=projected", "token_aligner.gradient=detached"),
    "head_aligner=convex": ("head_aligner=convex",),
    "head_aligner=mean": ("head_aligner=mean",),
    "head_aligner=none": ("head_aligner=none", "student.heads=2"),
    "head_aligner=a2d": ("head_aligner=a2d",),
    "head_aligner.stack=all": ("head_aligner.stack=all",),
    "head_aligner=convex,stack=all": ("head_aligner=convex", "head_aligner.stack=all"),
    # losses
    **{
        f"losses.{name}.enabled=false": (f"losses.{name}.enabled=false",) for name in ("rsd", "rel", "attn", "spectral")
    },
    "losses.rsd.center=global": ("losses.rsd.center=global",),
    **{f"losses.rsd.samples={name}": (f"losses.rsd.samples={name}",) for name in ("cls", "mean_pool", "pre_logits")},
    "losses.rsd.target=teacher_correlation": ("losses.rsd.target=teacher_correlation",),
    "losses.rsd.projector=linear": ("losses.rsd.projector=linear",),
    "losses.rsd.projector=none": ("losses.rsd.projector=none", "student.width=16", "student.heads=2"),
    "losses.rsd.reduction=sum": ("losses.rsd.reduction=sum",),
    "losses.rsd.kappa=0.1": ("losses.rsd.kappa=0.1",),
    "losses.rel.pairs=all": ("losses.rel.pairs=all",),
    "losses.rel.vertices=pooled": ("losses.rel.vertices=pooled",),
    "losses.rel.vertices=logits": ("losses.rel.vertices=logits",),
    "losses.rel.edge=difference": ("losses.rel.edge=difference",),
    "losses.rel.edge=cosine_gram": ("losses.rel.edge=cosine_gram",),
    "losses.rel.huber_delta=0.1": ("losses.rel.huber_delta=0.1",),
    "losses.rel.prune=0": ("losses.rel.prune=0.0",),
    **{f"losses.attn.normalize={name}": (f"losses.attn.normalize={name}",) for name in ("log_n", "none", "sum")},
    **{
        f"losses.spectral.mode={name}": (f"losses.spectral.mode={name}",)
        for name in ("half_spectrum", "log_magnitude", "phase", "high_band", "low_band", "spatial_mse")
    },
    "losses.logit.kind=kd": (ON["logit"], "losses.logit.kind=kd"),
    "losses.logit.kind=deit_soft": (ON["logit"], "losses.logit.kind=deit_soft"),
    "losses.logit.kind=deit_hard": (ON["logit"], "losses.logit.kind=deit_hard"),
    "losses.logit.reduction=elements": (ON["logit"], "losses.logit.reduction=elements"),
    **{
        f"losses.feature.samples={name}": (ON["feature"], f"losses.feature.samples={name}")
        for name in ("patches", "cls", "both")
    },
    # weighting and warmup
    **{
        f"weighting={name}": (f"weighting={name}",)
        for name in ("equal", "fixed", "uwo", "uncertainty", "dwa", "rlw", "gls", "imtl_l")
    },
    "weighting.scale=first_mean": ("weighting.scale=first_mean",),
    "weighting.scale=none": ("weighting.scale=none",),
    "weighting=equal,scale=first": ("weighting=equal", "weighting.scale=first"),
    **{
        f"weighting={name},scale=first": (f"weighting={name}", "weighting.scale=first")
        for name in ("fixed", "uwo", "uncertainty", "dwa", "rlw", "gls", "imtl_l")
    },
    "weighting.total=one": ("weighting.total=one",),
    "weighting=uwo,total=one": ("weighting=uwo", "weighting.total=one"),
    "weighting=uwo,total=n_active": ("weighting=uwo", "weighting.total=n_active"),
    "weighting=rlw,total=one": ("weighting=rlw", "weighting.total=one"),
    # without a ramp the order changes nothing
    "weighting.order=ramp_then_weights": ("weighting.order=ramp_then_weights", "warmup=simultaneous"),
    "warmup=staggered": ("warmup=staggered",),
    "warmup=simultaneous": ("warmup=simultaneous",),
    "objective.ce_weight=0.5": ("objective.ce_weight=0.5",),
    "objective.target_norm=none": ("objective.target_norm=none",),
}


# Arms that together contain every toggle but the presets, which have golden traces; no toggle of an arm makes another idle.
PACKED: tuple[tuple[str, ...], ...] = (
    ("basd",),
    ("method=basd_literal",),
    ("method=deit_hard",),
    ("method=deit_soft",),
    ("weighting=equal", "weighting.scale=first_mean", "selector=static", "selector.entropy=spread",
     "selector.temperature=0.5", "token_aligner=interpolate"),
    ("weighting=fixed", "weighting.scale=none", "selector=alp", "selector.entropy=none", "token_aligner=student_projection",
     "student.points=1"),
    ("weighting=uwo", "weighting.total=one", "selector=uniform", "token_aligner=frozen_random", "student.points=all",
     "views=single"),
    ("weighting=uncertainty", "selector=forward", "token_aligner.values=projected", "token_aligner.gradient=detached",
     "student.points=[0,2]", "views.geometry=independent"),
    ("weighting=dwa", "selector=reverse", "token_aligner.values=projected,detached", "views.strong=randaugment_full",
     "mixing=mixup", "mixing.targets=clean"),
    ("weighting=rlw", "selector=random", "views.strong=three_augment", "mixing=cutmix", "mixing.targets=same_input",
     "mixing.probability=0.5"),
    ("weighting=gls", "selector=all_to_one", "mixing=none", "head_aligner=convex", "head_aligner.stack=all",
     "losses.rsd.enabled=false"),
    ("weighting=imtl_l", "selector=last", "mixing.targets=skip", "head_aligner=mean", "losses.rel.enabled=false",
     "losses.spectral.enabled=false"),
    ("weighting=equal,scale=first", "selector=spectral_similarity", "head_aligner=none", "losses.rsd.center=global",
     "losses.rsd.target=teacher_correlation", "losses.rsd.projector=linear"),
    ("weighting=fixed,scale=first", "head_aligner=a2d", "losses.rsd.samples=cls", "losses.rsd.projector=none",
     "losses.rsd.reduction=sum", "losses.rsd.kappa=0.1"),
    ("weighting=uwo,scale=first", "head_aligner=convex,stack=all", "losses.rsd.samples=mean_pool", "losses.rel.pairs=all",
     "losses.rel.vertices=pooled", "losses.rel.edge=difference"),
    ("weighting=uncertainty,scale=first", "losses.attn.enabled=false", "losses.rsd.samples=pre_logits",
     "losses.rel.vertices=logits", "losses.rel.huber_delta=0.1", "losses.rel.prune=0"),
    ("weighting=dwa,scale=first", "losses.rel.edge=cosine_gram", "losses.attn.normalize=log_n",
     "losses.spectral.mode=half_spectrum", "losses.logit.kind=kd", "losses.feature.samples=patches"),
    ("weighting=rlw,scale=first", "losses.attn.normalize=none", "losses.spectral.mode=log_magnitude",
     "losses.logit.kind=deit_hard", "losses.feature.samples=cls"),
    ("weighting=gls,scale=first", "losses.attn.normalize=sum", "losses.spectral.mode=phase",
     "losses.logit.reduction=elements", "losses.feature.samples=both", "warmup=simultaneous"),
    ("weighting=imtl_l,scale=first", "losses.spectral.mode=high_band", "objective.ce_weight=0.5",
     "objective.target_norm=none"),
    ("weighting=uwo,total=one", "losses.spectral.mode=low_band", "warmup=staggered"),
    ("weighting=uwo,total=n_active", "losses.spectral.mode=spatial_mse"),
    ("weighting=rlw,total=one",),
    ("weighting.order=ramp_then_weights",),
)  # fmt: skip


def overrides_of(*names: str) -> list[str]:
    """Overrides of a tiny arm with these toggles; every loss counts in full from the first step, unless warmup is one of them."""
    own = [text for name in names for text in TOGGLES[name]]
    given = any(text.startswith(("method=", "warmup=")) for text in own)
    return own if given else ["warmup=none", *own]
