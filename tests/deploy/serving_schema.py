"""What of the published schemas the serving manifests use.

Written down from the reference of apps/v1, autoscaling/v2, policy/v1 and core/v1 (Kubernetes API
v1.34, kubernetes.io/docs/reference/kubernetes-api), of serving.knative.dev/v1
(knative.dev/docs/serving/reference/serving-api) and of monitoring.googleapis.com/v1
(github.com/GoogleCloudPlatform/prometheus-engine, doc/api.md), and of leaderworkerset.x-k8s.io/v1
(github.com/kubernetes-sigs/lws, api/leaderworkerset/v1). A field that is not here is refused.
"""

from tests.train.launch.jobset_schema import (
    BOOLEAN,
    COUNT,
    LABELS,
    METADATA,
    NAME,
    POD,
    STRING,
    fields,
    one_of,
    some,
)

PORT = {"type": int, "minimum": 1, "maximum": 65535}
QUANTITIES = {"type": dict, "values": {"type": str, "pattern": r"[1-9]\d*(m|[KMGT]i?)?"}}
SELECTOR = fields(["matchLabels"], matchLabels=LABELS)
PROBE = fields(
    ["httpGet"],
    httpGet=fields(["path", "port"], path={"type": str, "pattern": "/.*"}, port=PORT),
    periodSeconds={"type": int, "minimum": 1},
    timeoutSeconds={"type": int, "minimum": 1},
    failureThreshold={"type": int, "minimum": 1},
    initialDelaySeconds=COUNT,
)
_POD = POD["properties"]
_CONTAINER = _POD["containers"]["items"]["properties"]
CONTAINER = fields(
    ["name", "image"],
    **{
        **_CONTAINER,
        "args": some(STRING),
        "resources": fields([], requests=QUANTITIES, limits=QUANTITIES),
        "readinessProbe": PROBE,
        "livenessProbe": PROBE,
        "startupProbe": PROBE,
        # Sleep is a handler since v1.30.
        "lifecycle": fields([], preStop=fields([], sleep=fields(["seconds"], seconds=COUNT))),
    },
)
SERVING_POD = {**_POD, "containers": some(CONTAINER), "enableServiceLinks": BOOLEAN}
TEMPLATE_METADATA = fields([], labels=LABELS, annotations=LABELS)


def kind(version, name, spec):
    return fields(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion=one_of(version),
        kind=one_of(name),
        metadata=METADATA,
        spec=spec,
    )


SERVICE = kind(
    "v1",
    "Service",
    fields(
        ["ports"],
        selector=LABELS,
        ports=some(fields(["port"], name=NAME, port=PORT, targetPort=PORT)),
    ),
)
DEPLOYMENT = kind(
    "apps/v1",
    "Deployment",
    fields(
        ["selector", "template"],
        replicas=COUNT,
        selector=SELECTOR,
        strategy=fields(
            [],
            type=one_of("RollingUpdate", "Recreate"),
            rollingUpdate=fields([], maxSurge=COUNT, maxUnavailable=COUNT),
        ),
        template=fields(
            ["metadata", "spec"],
            metadata=TEMPLATE_METADATA,
            spec=fields(["containers"], **SERVING_POD),
        ),
    ),
)
_GROUP_TEMPLATE = fields(
    ["metadata", "spec"],
    metadata=TEMPLATE_METADATA,
    spec=fields(["containers"], **SERVING_POD),
)
LEADER_WORKER_SET = kind(
    "leaderworkerset.x-k8s.io/v1",
    "LeaderWorkerSet",
    fields(
        ["leaderWorkerTemplate"],
        replicas=COUNT,
        startupPolicy=one_of("LeaderCreated", "LeaderReady"),
        rolloutStrategy=fields(
            ["type"],
            type=one_of("RollingUpdate"),
            rollingUpdateConfiguration=fields([], maxUnavailable=COUNT, maxSurge=COUNT),
        ),
        leaderWorkerTemplate=fields(
            ["workerTemplate"],
            leaderTemplate=_GROUP_TEMPLATE,
            workerTemplate=_GROUP_TEMPLATE,
            size={"type": int, "minimum": 1},
            restartPolicy=one_of("RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"),
        ),
    ),
)
DISRUPTION_BUDGET = kind(
    "policy/v1",
    "PodDisruptionBudget",
    fields(["selector"], maxUnavailable=COUNT, minAvailable=COUNT, selector=SELECTOR),
)
POD_MONITORING = kind(
    "monitoring.googleapis.com/v1",
    "PodMonitoring",
    fields(
        ["selector", "endpoints"],
        selector=SELECTOR,
        endpoints=some(
            fields(
                ["port", "interval"],
                port=STRING,
                path=STRING,
                interval={"type": str, "pattern": r"\d+(ms|s|m|h)"},
            )
        ),
    ),
)
_POLICIES = some(
    fields(
        ["type", "value", "periodSeconds"],
        type=one_of("Pods", "Percent"),
        value={"type": int, "minimum": 1},
        periodSeconds={"type": int, "minimum": 1, "maximum": 1800},
    )
)
_SCALING = fields(
    [],
    stabilizationWindowSeconds={"type": int, "minimum": 0, "maximum": 3600},
    policies=_POLICIES,
    selectPolicy=one_of("Max", "Min", "Disabled"),
)
AUTOSCALER = kind(
    "autoscaling/v2",
    "HorizontalPodAutoscaler",
    fields(
        ["scaleTargetRef", "maxReplicas"],
        scaleTargetRef=fields(["kind", "name"], apiVersion=STRING, kind=STRING, name=NAME),
        minReplicas=COUNT,
        maxReplicas={"type": int, "minimum": 1},
        metrics=some(
            fields(
                ["type", "pods"],
                type=one_of("Pods"),
                pods=fields(
                    ["metric", "target"],
                    metric=fields(["name"], name=STRING),
                    target=fields(
                        ["type", "averageValue"],
                        type=one_of("AverageValue"),
                        averageValue={"type": str, "pattern": r"\d+m?"},
                    ),
                ),
            )
        ),
        behavior=fields([], scaleUp=_SCALING, scaleDown=_SCALING),
    ),
)
_KNATIVE_POD = {
    key: value
    for key, value in SERVING_POD.items()
    if key in ("containers", "volumes", "enableServiceLinks")
}
KNATIVE_SERVICE = kind(
    "serving.knative.dev/v1",
    "Service",
    fields(
        ["template"],
        template=fields(
            ["spec"],
            metadata=TEMPLATE_METADATA,
            spec=fields(
                ["containers"],
                **_KNATIVE_POD,
                containerConcurrency={"type": int, "minimum": 0, "maximum": 1000},
                timeoutSeconds={"type": int, "minimum": 1, "maximum": 3600},
                serviceAccountName=STRING,
            ),
        ),
    ),
)

SCHEMAS = {
    ("v1", "Service"): SERVICE,
    ("apps/v1", "Deployment"): DEPLOYMENT,
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): LEADER_WORKER_SET,
    ("policy/v1", "PodDisruptionBudget"): DISRUPTION_BUDGET,
    ("monitoring.googleapis.com/v1", "PodMonitoring"): POD_MONITORING,
    ("autoscaling/v2", "HorizontalPodAutoscaler"): AUTOSCALER,
    ("serving.knative.dev/v1", "Service"): KNATIVE_SERVICE,
}
