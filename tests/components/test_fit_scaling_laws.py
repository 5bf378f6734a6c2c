"""From a sweep on disk to law, report and result."""

import json

import pytest

from components.fit_scaling_laws import FitScalingLawsConfig, fit_scaling_laws
from ling_flow.errors import UserError
from ling_flow.flow.component import Input, Output, Step
from ling_flow.flow.tracking import NullTracker
from ling_flow.model.flops import training_flops_per_token
from ling_flow.model.presets import model_preset
from ling_flow.scaling.design import Sweep
from ling_flow.scaling.law import HyperParameterLaw, PowerLaw, ScalingLaw
from tests.scaling.synthetic import sweep

LAW = HyperParameterLaw(
    learning_rate=PowerLaw(coefficient=2.0, exponent=-0.22), batch_tokens=PowerLaw(coefficient=2e-3, exponent=0.5)
)
CONFIG = FitScalingLawsConfig(model=model_preset("tiny"), tokens=2_000_000, sequence_length=128, bootstrap_samples=20)


@pytest.fixture
def run(tmp_path):
    """Runs the component's body on a sweep drawn from LAW."""
    trials = sweep(
        LAW, (5e5, 1.3e6, 2.6e6), (8e4, 1e5, 1e5), (2e-3, 4e-3, 8e-3), (512, 1024, 2048), noise=0.003, seed=1
    )

    def call(config: FitScalingLawsConfig):
        folders = [tmp_path / name for name in ("trials", "law", "report")]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        Sweep(trials=tuple(trials)).save(folders[0])
        outputs = [Output(folder) for folder in folders[1:]]
        given = Input("ref", folders[0], "fp", {"tokenizer": "t"})
        step = Step("fit_scaling_laws", tmp_path, NullTracker(), "0")
        return fit_scaling_laws.body(
            config, trials=given, scaling_law=outputs[0], report=outputs[1], step=step
        ), outputs

    return call


def test_law_result_and_report_agree(run, capsys):
    result, (law_output, report) = run(CONFIG)
    law = ScalingLaw.load(law_output.path)
    chosen = law.recommendation
    flops = training_flops_per_token(CONFIG.model, 128).non_embedding
    assert chosen.target_compute_flops == pytest.approx(flops * 2_000_000)
    assert (result.learning_rate, result.batch_tokens) == (chosen.learning_rate, chosen.batch_tokens)
    assert result.batch_tokens % 128 == 0
    assert result.predicted_loss_low <= result.predicted_loss <= result.predicted_loss_high
    assert result.learning_rate == pytest.approx(LAW.learning_rate.at(chosen.target_compute_flops), rel=0.5)
    assert result.clamped == len(chosen.clamped)
    assert law_output.contract == {"tokenizer": "t"}
    assert chosen.tokens_factor == pytest.approx(20, rel=1e-3)
    said = "target: 1 times the FLOPs per token of the largest trial, 20 times the most tokens of one\n"
    assert said in capsys.readouterr().err
    page = (report.path / "index.html").read_text()
    assert page.count("<svg") == 3
    assert f"{chosen.learning_rate:.3g}" in page and f"{chosen.batch_tokens:,}" in page
    assert "src=" not in page and 'href="http' not in page, "the page is self-contained"
    assert json.loads((law_output.path / "law.json").read_text())["schema_version"] == 1


def test_a_far_target_is_refused_by_field(run):
    with pytest.raises(UserError, match="allow_extrapolation_factor"):
        run(CONFIG.model_copy(update={"tokens": 200_000_000}))


def test_sequence_longer_than_the_model_is_refused():
    with pytest.raises(ValueError, match="sequence_length must be at most"):
        FitScalingLawsConfig(model=model_preset("tiny"), tokens=1, sequence_length=4096)
