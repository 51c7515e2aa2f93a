"""What examples/launch/ uses of the schemas that clusters check: a key that is not here is a mistake.

Written down from the Go types of Kubeflow Trainer 2.2 (``trainjob_types.go``) and of Training Operator 1.9
(``pytorch_types.go``, ``common_types.go``), from Kubernetes' API reference (core/v1), and from SkyPilot 0.14
(``sky/utils/schemas.py``).
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer", "minimum": 1}


def strict(*required: str, **properties: Schema) -> Schema:
    """An object with these properties and no others."""
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def several(item: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "items": item}


def just(*values: str) -> Schema:
    return {"enum": list(values)}


# Kubernetes
NAME: Schema = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
METADATA = strict("name", name=NAME)
ENVIRONMENT = several(
    {
        **strict(
            "name", name=TEXT, value=TEXT, valueFrom=strict(secretKeyRef=strict("key", "name", key=TEXT, name=TEXT))
        ),
        "oneOf": [{"required": ["value"]}, {"required": ["valueFrom"]}],
    }
)
RESOURCES = strict(limits={"type": "object", "additionalProperties": {"type": ["integer", "string"]}})
MOUNTS = several(strict("name", "mountPath", name=NAME, mountPath={"type": "string", "pattern": "^/"}))
VOLUMES = several(
    {
        **strict(
            "name",
            name=NAME,
            persistentVolumeClaim=strict("claimName", claimName=NAME),
            emptyDir=strict(medium=just("", "Memory")),
        ),
        "minProperties": 2,
        "maxProperties": 2,
    }
)

# Kubeflow Training Operator
PYTORCH_JOB = strict(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion=just("kubeflow.org/v1"),
    kind=just("PyTorchJob"),
    metadata=METADATA,
    spec=strict(
        "pytorchReplicaSpecs",
        elasticPolicy=strict(
            rdzvBackend=just("c10d", "etcd", "etcd-v2"), minReplicas=NUMBER, maxReplicas=NUMBER, maxRestarts=NUMBER
        ),
        runPolicy=strict(cleanPodPolicy=just("", "All", "Running", "None")),
        pytorchReplicaSpecs=strict(
            Worker=strict(
                "replicas",
                "template",
                replicas=NUMBER,
                restartPolicy=just("Always", "OnFailure", "Never", "ExitCode"),
                template=strict(
                    "spec",
                    spec=strict(
                        "containers",
                        containers=several(
                            strict(
                                "name",
                                "image",
                                name=just("pytorch"),
                                image=TEXT,
                                workingDir=TEXT,
                                command=several(TEXT),
                                env=ENVIRONMENT,
                                resources=RESOURCES,
                                volumeMounts=MOUNTS,
                            )
                        ),
                        volumes=VOLUMES,
                    ),
                ),
            )
        ),
    ),
)

# Kubeflow Trainer
POD_PATCH = strict(volumes=VOLUMES, containers=several(strict("name", name=just("node"), volumeMounts=MOUNTS)))
TRAIN_JOB = strict(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion=just("trainer.kubeflow.org/v1alpha1"),
    kind=just("TrainJob"),
    metadata=METADATA,
    spec=strict(
        "runtimeRef",
        runtimeRef=strict("name", name=TEXT),
        trainer=strict(
            image=TEXT,
            command=several(TEXT),
            env=ENVIRONMENT,
            numNodes=NUMBER,
            numProcPerNode=NUMBER,
            resourcesPerNode=RESOURCES,
        ),
        runtimePatches=several(
            strict(
                "manager",
                manager=TEXT,
                trainingRuntimeSpec=strict(
                    template=strict(
                        spec=strict(
                            replicatedJobs=several(
                                strict(
                                    "name",
                                    name=just("node"),
                                    template=strict(spec=strict(template=strict(spec=POD_PATCH))),
                                )
                            )
                        )
                    )
                ),
            )
        ),
    ),
)

# SkyPilot
SKYPILOT_TASK = strict(
    name=TEXT,
    workdir=TEXT,
    num_nodes=NUMBER,
    resources=strict(
        infra={"type": "string", "pattern": "^(kubernetes|k8s)(/.+)?$"},
        accelerators=TEXT,
        job_recovery=strict(max_restarts_on_errors={"type": "integer", "minimum": 0}),
    ),
    volumes={"type": "object", "additionalProperties": TEXT},
    secrets={"type": "object", "additionalProperties": {"type": ["string", "null"]}},
    setup=TEXT,
    run=TEXT,
)
SKYPILOT_VOLUME = strict(
    "name",
    "type",
    name=TEXT,
    type=just("k8s-pvc"),
    infra=TEXT,
    size={"type": "string", "pattern": "^[0-9]+Gi$"},
    config=strict(access_mode=just("ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany", "ReadOnlyMany")),
)
