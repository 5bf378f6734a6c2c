"""The whole lifecycle: from raw text to a served endpoint.

    plan → prepare_data → wind_tunnel → fit_scaling_laws → pretrain ×3 → merge_checkpoints
         → capability_pass → preference_pass → evaluate → register → deploy

`plan` resolves preset and overrides into one validated config per phase; every other node takes its config from there,
as one JSON string. What travels along the edges are references to artifacts, never their bytes.
"""

from kfp import dsl

from components.capability_pass import capability_pass
from components.deploy import deploy
from components.evaluate import evaluate
from components.fit_scaling_laws import fit_scaling_laws
from components.merge_checkpoints import merge_checkpoints
from components.plan import plan
from components.preference_pass import preference_pass
from components.prepare_data import prepare_data
from components.pretrain import pretrain
from components.register import register
from components.wind_tunnel import wind_tunnel


@dsl.pipeline(name="lifecycle", description="A Ling-2.0-style sparse MoE, from nothing to a served endpoint.")
def lifecycle(preset: str = "tiny", overrides: str = "{}", seed: int = 0) -> None:
    """Args:
    preset: Name of a typed preset: tiny (laptop, minutes) or small.
    overrides: JSON object laid over the preset, for example {"pretrain_short": {"tokens": 200000}}.
    seed: Seed of data order, initial weights, sampling and bootstrap.
    """
    planned = plan.kfp(preset=preset, overrides=overrides, seed=seed)
    configs = planned.outputs

    data = prepare_data.kfp(config=configs["prepare_data"])
    corpus = data.outputs["corpus"]

    tunnel = wind_tunnel.kfp(config=configs["wind_tunnel"], corpus=corpus)
    fit = fit_scaling_laws.kfp(config=configs["fit_scaling_laws"], trials=tunnel.outputs["trials"])
    law = fit.outputs["scaling_law"]

    short = pretrain.kfp(config=configs["pretrain_short"], corpus=corpus, scaling_law=law)
    short.set_display_name("pretrain_short")
    mid = pretrain.kfp(
        config=configs["pretrain_mid"], corpus=corpus, scaling_law=law, previous=short.outputs["checkpoints"]
    )
    mid.set_display_name("pretrain_mid")
    long = pretrain.kfp(
        config=configs["pretrain_long"], corpus=corpus, scaling_law=law, previous=mid.outputs["checkpoints"]
    )
    long.set_display_name("pretrain_long")
    merge = merge_checkpoints.kfp(
        config=configs["merge_checkpoints"], checkpoints=long.outputs["checkpoints"], corpus=corpus
    )

    capability = capability_pass.kfp(config=configs["capability_pass"], base=merge.outputs["model"], corpus=corpus)
    preference = preference_pass.kfp(config=configs["preference_pass"], base=capability.outputs["model"], corpus=corpus)
    model = preference.outputs["model"]

    report = evaluate.kfp(config=configs["evaluate"], model=model, corpus=corpus)
    entry = register.kfp(config=configs["register"], model=model, metrics=report.outputs["metrics"])
    service = deploy.kfp(config=configs["deploy"], registration=entry.outputs["registration"])

    # Steps are served by their own fingerprints; KFP's cache cannot see the environment nor the world outside.
    for task in (
        planned, data, tunnel, fit, short, mid, long, merge, capability, preference, report, entry, service
    ):  # fmt: skip
        task.set_caching_options(False)
