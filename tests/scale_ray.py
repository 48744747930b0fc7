"""Two replicas of vLLM behind Ray Serve, on this machine: `python scale_ray.py PORT TEMP WEIGHTS`, in scale.py's VENV.

SIGHUP replaces the replicas one by one, as a new version of the model would; `updated` is printed at its end.
"""

import signal
import sys

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app
from scale import NAME, REPLICAS, SETTINGS, VARIABLES

port, temp, weights = int(sys.argv[1]), *sys.argv[2:]
# What is replaced ends its streams first, for at most this many seconds: replicas, and what relays their streams.
PATIENT = {"graceful_shutdown_timeout_s": 120}


def deploy() -> None:
    """Start the replicas, or replace those of the last version; returns when all serve."""
    # Each computes with one thread, since two on two cores would wait for each other.
    variables = {**VARIABLES, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    config = LLMConfig(
        model_loading_config={"model_id": NAME, "model_source": weights},
        accelerator_config={"kind": "cpu"},
        engine_kwargs={**SETTINGS, "max_num_seqs": 8},
        deployment_config={"num_replicas": REPLICAS, **PATIENT},
        runtime_env={"env_vars": variables},
    )
    serve.run(build_openai_app({"llm_configs": [config], "ingress_deployment_config": PATIENT}))


def update(*_: object) -> None:
    deploy()
    print("updated", flush=True)


ray.init(num_cpus=16, include_dashboard=False, _temp_dir=temp)  # as many as Ray Serve asks for; they are not reserved
serve.start(http_options={"host": "127.0.0.1", "port": port})
deploy()
signal.signal(signal.SIGHUP, update)
print(f"listening on http://127.0.0.1:{port}", flush=True)
while True:
    signal.pause()
