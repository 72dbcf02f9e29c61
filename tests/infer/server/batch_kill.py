"""A batch run with a real engine on a tiny model, to be killed: IN OUT ASKED."""

import asyncio
import sys
from pathlib import Path

NUM_REQUESTS = 60


def main() -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    from infer.engine.engine import BatchingEngine
    from infer.engine.options import EngineOptions
    from infer.server.batch import run_batch
    from infer.server.loaded import Built, Source
    from infer.server.settings import Settings
    from tests.infer.server.running import byte_tokenizer
    from tests.tiny import tiny_config, tiny_params

    source, target, asked = map(Path, sys.argv[1:])
    tokenizer = byte_tokenizer()
    config = tiny_config(vocab_size=tokenizer.vocab_size, eos_token_id=())

    class Noting(BatchingEngine):
        def submit(self, request, on_event):
            if request.id != "probe":
                with asked.open("a") as file:
                    file.write(request.id + "\n")
            super().submit(request, on_event)

    def build(_):
        options = EngineOptions(max_slots=4, piece_tokens=32, block_size=16)
        return Built(Noting((config, tiny_params(config), tokenizer), options), tokenizer)

    model = Source("m", "1", "m")
    asyncio.run(
        run_batch(source, target, settings=Settings(models=("m",)), build=build, model=model)
    )


if __name__ == "__main__":
    main()
