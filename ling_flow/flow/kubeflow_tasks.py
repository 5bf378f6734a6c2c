"""A profile applied to a DAG: the tasks that KFP compiles get image, resources, secrets, retries and the rest.

The DAG's own file is not changed for it: its pipeline function is called once more, inside a second pipeline of the
same name and parameters, and the tasks it makes are walked. Around them stands KFP's exit handler, whose one task
closes the run in MLflow.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from ling_flow.errors import UserError
from ling_flow.flow.component import Component
from ling_flow.flow.doctor import install
from ling_flow.flow.kfp_face import ENTRY_POINT, component_names, load_component
from ling_flow.flow.profile import SCRATCH, Profile, StepSettings

# What a step is told of the run it belongs to, from the labels that Kubeflow puts on its pods.
RUN_ID, WORKFLOW, RUN_NAME = "LING_FLOW_KFP_RUN_ID", "LING_FLOW_WORKFLOW", "LING_FLOW_KFP_RUN_NAME"
_FIELDS = {
    RUN_ID: "metadata.labels['pipeline/runid']",
    WORKFLOW: "metadata.labels['workflows.argoproj.io/workflow']",
    RUN_NAME: "metadata.labels['workflows.argoproj.io/workflow']",
}
EXIT_TIMEOUT = 900  # seconds


def with_profile(pipeline: Any, profile: Profile, where: str) -> Any:
    """`pipeline` as it is to be compiled for `profile`; `where` is the profile's name in errors.

    Raises:
        UserError: the profile speaks of a component that neither this project nor this DAG has; or a task of the DAG is
            a pipeline of its own, whose tasks cannot be reached.
    """
    from kfp import dsl

    function = pipeline.pipeline_func
    described = pipeline.pipeline_spec.pipeline_info

    def placed(*values: Any) -> None:
        if profile.exit_handler and profile.mlflow:
            with dsl.ExitHandler(_exit_task(profile), name="steps"):
                function(*values)
        else:
            function(*values)
        _apply(profile, where)

    placed.__name__, placed.__doc__ = function.__name__, function.__doc__
    placed.__signature__ = inspect.signature(function).replace(  # type: ignore[attr-defined]
        return_annotation=inspect.Signature.empty
    )
    config = dsl.PipelineConfig(
        ttl_seconds_after_finished=profile.kfp.ttl_s, active_deadline_seconds=profile.kfp.deadline_s
    )
    # Without any of them KFP would write an empty platform document.
    named: Callable[..., Any] = dsl.pipeline(
        name=described.name,
        description=described.description or None,
        pipeline_config=config if (profile.kfp.ttl_s, profile.kfp.deadline_s) != (None, None) else None,
    )
    return named(placed)


def _apply(profile: Profile, where: str) -> None:
    from kfp.dsl import pipeline_context

    tasks = list(pipeline_context.Pipeline.get_default_pipeline().tasks.values())
    components = {task.name: _component_of(task) for task in tasks}
    check_components(profile, where, [one for one in components.values() if one is not None])
    for task in tasks:
        component = components[task.name]
        if component is not None:
            settings = profile.of(component)
            _place(task, profile, settings)
            retries = settings.retries
            if retries.count:
                window = retries.window_s(settings.timeout_s)
                task.set_retry(retries.count, f"{retries.wait_s}s", float(retries.factor), f"{window}s")


def _component_of(task: Any) -> Component | None:
    """The component that a task runs, None for the exit task."""
    container = task.container_spec
    command = " ".join([*(container.command or ()), *(container.args or ())]) if container else ""
    found = ENTRY_POINT.search(command)
    if found:
        return load_component(found[1])
    if task.name == _EXIT_NAME:
        return None
    raise UserError(f"task {task.name!r}: is not made by a component's .kfp, so no profile can be applied to it")


def check_components(profile: Profile, where: str, of_dag: list[Component]) -> None:
    """
    Raises:
        UserError: the profile speaks of a component that there is not, or asks of one what it cannot do.
    """
    if not profile.components:
        return
    known = {component.name: component for component in (*_project_components(), *of_dag)}
    for name, own in profile.components.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(sorted(known))}"
            raise UserError(f"{where}.components.{name}: no such component; {advice}")
        if known[name].runs_on == "process" and own.get("run_on", "process") != "process":
            raise UserError(f"{where}.components.{name}.run_on: {name} always runs in its step; only process is right")


def _project_components() -> list[Component]:
    return [load_component(f"components.{name}:{name}") for name in component_names()]


def _kfp_kubernetes() -> Any:
    """
    Raises:
        UserError: the package is not there.
    """
    try:
        from kfp import kubernetes
    except ImportError:
        raise UserError(f"--profile: needs the package kfp-kubernetes; {install('kubeflow')}") from None
    return kubernetes


def _place(task: Any, profile: Profile, settings: StepSettings) -> None:
    """Everything but retries, which an exit task must not have."""
    kubernetes = _kfp_kubernetes()
    task.set_container_image(settings.image)
    task.set_caching_options(False)  # steps are served by their own fingerprints
    resources = profile.pod_resources(settings)
    cpus, memory = f"{round(resources.cpus * 1000)}m", f"{round(resources.memory_gib * 1024)}Mi"
    task.set_cpu_request(cpus).set_cpu_limit(cpus).set_memory_request(memory).set_memory_limit(memory)
    if resources.gpus:
        task.set_accelerator_type(settings.accelerator).set_accelerator_limit(resources.gpus)
    for name, value in sorted(profile.environment(settings).items()):
        task.set_env_variable(name, value)
    for name, path in _FIELDS.items():
        kubernetes.use_field_path_as_env(task, name, path)
    for secret in settings.secrets:
        kubernetes.use_secret_as_env(task, secret.secret, {secret.key: secret.env})
    if settings.run_on == "process":  # a pod that only starts a job may run on any node
        for key, value in settings.node_selector.items():
            kubernetes.add_node_selector(task, key, value)
        for one in settings.tolerations:
            kubernetes.add_toleration(task, one.key, one.operator, one.value, one.effect)
        if settings.shared_memory_gib is not None:
            size = f"{round(settings.shared_memory_gib * 1024)}Mi"
            kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", "Memory", size)
    kubernetes.empty_dir_mount(task, "scratch", SCRATCH, size_limit=f"{round(settings.scratch_gib * 1024)}Mi")
    for volume in profile.volumes:
        kubernetes.mount_pvc(task, volume.claim, volume.path)
    kubernetes.set_timeout(task, settings.timeout_s)
    kubernetes.set_image_pull_policy(task, profile.pull_policy)
    if profile.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(profile.pull_secrets))
    if profile.run_as_user is not None:
        kubernetes.set_security_context(task, run_as_user=profile.run_as_user, run_as_non_root=True)


_EXIT_NAME = "close-run"


def _exit_task(profile: Profile) -> Any:
    """The task that runs after all others, whatever became of them. KFP gives it their final state."""
    from kfp import dsl

    from ling_flow.flow.component import Resources

    def close_run(status: dsl.PipelineTaskFinalStatus) -> None:
        from ling_flow.flow.exit_task import close_run

        close_run(status.state)

    # Real types, not their names: KFP reads the annotation.
    close_run.__annotations__ = {"status": dsl.PipelineTaskFinalStatus, "return": None}
    task = dsl.component(base_image=profile.image, install_kfp_package=False)(close_run)()
    settings = profile.steps.model_copy(
        update={
            "image": profile.steps.image or profile.image, "run_on": "process", "timeout_s": EXIT_TIMEOUT,
            "resources": Resources(cpus=0.5, memory_gib=1), "node_selector": {}, "tolerations": (),
            "shared_memory_gib": None, "scratch_gib": 1,
        }
    )  # fmt: skip
    _place(task, profile, settings)
    return task
