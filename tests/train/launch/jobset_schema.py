"""What of the published schemas a launch's manifests use, and a checker for it.

Written down from the reference of batch/v1 Job and core/v1 (Kubernetes API v1.34,
kubernetes.io/docs/reference/kubernetes-api) and of jobset.x-k8s.io/v1alpha2
(jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2). A field that is not here is refused, so a
misspelled one is seen.
"""

import re

STRING, INTEGER, BOOLEAN = {"type": str}, {"type": int}, {"type": bool}
COUNT = {"type": int, "minimum": 0}
LABELS = {"type": dict, "values": STRING}
# A DNS label (RFC 1123), and with the dots and slash of a qualified key.
NAME = {"type": str, "pattern": r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", "longest": 63}
# Quantities of extended resources are whole numbers.
QUANTITIES = {"type": dict, "values": {"type": str, "pattern": r"[1-9]\d*"}}


def one_of(*values):
    return {"type": str, "enum": values}


def fields(required=(), **properties):
    return {"type": dict, "properties": properties, "required": required}


def some(items):
    return {"type": list, "items": items}


METADATA = fields(["name"], name=NAME, namespace=NAME, labels=LABELS, annotations=LABELS)

CONTAINER = fields(
    ["name", "image"],
    name=NAME,
    image=STRING,
    command=some(STRING),
    env=some(
        fields(
            ["name"],
            name={"type": str, "pattern": r"[-._a-zA-Z][-._a-zA-Z0-9]*"},
            value=STRING,
            valueFrom=fields([], secretKeyRef=fields(["key"], name=STRING, key=STRING)),
        )
    ),
    ports=some(
        fields(
            ["containerPort"],
            name={**NAME, "longest": 15},
            containerPort={"type": int, "minimum": 1, "maximum": 65535},
        )
    ),
    resources=fields([], requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=some(fields(["name", "mountPath"], name=NAME, mountPath=STRING, readOnly=BOOLEAN)),
)

POD = fields(
    ["containers"],
    restartPolicy=one_of("Always", "Never", "OnFailure"),
    terminationGracePeriodSeconds=COUNT,
    serviceAccountName=STRING,
    nodeSelector=LABELS,
    tolerations=some(
        fields(
            [],
            key=STRING,
            operator=one_of("Exists", "Equal"),
            value=STRING,
            effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
        )
    ),
    containers=some(CONTAINER),
    volumes=some(
        fields(
            ["name"],
            name=NAME,
            configMap=fields([], name=STRING),
            emptyDir=fields([], medium=one_of("", "Memory")),
            csi=fields(["driver"], driver=STRING, volumeAttributes=LABELS, readOnly=BOOLEAN),
        )
    ),
)

JOB_SPEC = fields(
    ["template"],
    parallelism=COUNT,
    completions=COUNT,
    completionMode=one_of("NonIndexed", "Indexed"),
    backoffLimit=COUNT,
    podFailurePolicy=fields(
        ["rules"],
        rules=some(
            fields(
                ["action"],
                action=one_of("FailJob", "FailIndex", "Ignore", "Count"),
                onPodConditions=some(
                    fields(["type", "status"], type=STRING, status=one_of("True", "False"))
                ),
            )
        ),
    ),
    template=fields(["spec"], metadata=fields([], labels=LABELS, annotations=LABELS), spec=POD),
)

JOB_SET = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion=one_of("jobset.x-k8s.io/v1alpha2"),
    kind=one_of("JobSet"),
    metadata=METADATA,
    spec=fields(
        ["replicatedJobs"],
        failurePolicy=fields(
            [],
            maxRestarts=COUNT,
            restartStrategy=one_of("Recreate", "BlockingRecreate"),
            rules=some(
                fields(
                    ["action", "name"],
                    name={"type": str, "pattern": r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"},
                    action=one_of(
                        "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"
                    ),
                    onJobFailureReasons=some(
                        one_of(
                            "BackoffLimitExceeded",
                            "DeadlineExceeded",
                            "FailedIndexes",
                            "MaxFailedIndexesExceeded",
                            "PodFailurePolicy",
                        )
                    ),
                )
            ),
        ),
        network=fields([], enableDNSHostnames=BOOLEAN, publishNotReadyAddresses=BOOLEAN),
        replicatedJobs=some(
            fields(
                ["name", "template"],
                name=NAME,
                replicas=COUNT,
                template=fields(["spec"], spec=JOB_SPEC),
            )
        ),
    ),
)

CONFIG_MAP = fields(
    ["apiVersion", "kind", "metadata"],
    apiVersion=one_of("v1"),
    kind=one_of("ConfigMap"),
    metadata=METADATA,
    data=LABELS,
)


def problems(value, schema, where="$"):
    """Where `value` does not follow `schema`: one line each."""
    kind = schema["type"]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        return [f"{where}: {value!r} is no {kind.__name__}"]
    found = []
    if kind is dict and "properties" in schema:
        known = schema["properties"]
        found += [f"{where}.{key} is unknown" for key in value if key not in known]
        found += [f"{where}.{key} is missing" for key in schema["required"] if key not in value]
        for key in value.keys() & known.keys():
            found += problems(value[key], known[key], f"{where}.{key}")
    elif kind is dict:
        for key, item in value.items():
            found += problems(item, schema["values"], f"{where}.{key}")
    elif kind is list:
        for number, item in enumerate(value):
            found += problems(item, schema["items"], f"{where}[{number}]")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r} is not one of {schema['enum']}")
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        found.append(f"{where}: {value!r} does not match {schema['pattern']}")
    if len(value) > schema["longest"] if "longest" in schema else False:
        found.append(f"{where}: {value!r} is longer than {schema['longest']}")
    low, high = schema.get("minimum"), schema.get("maximum")
    if (low is not None and value < low) or (high is not None and value > high):
        found.append(f"{where}: {value} is out of range")
    return found
