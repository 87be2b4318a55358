"""The folder of a fine-tuning: `finetune.yaml`, `log.jsonl`, `checkpoints/`, `model/` and, last, `metrics.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foldrank.finetune.settings import FinetuneSettings
from foldrank.train.output_folder import OutputFolder


class FinetuneFolder(OutputFolder):
    """A fine-tuning's folder, whether it is there or not."""

    config_name = "finetune.yaml"

    @property
    def model(self) -> Path:
        """The fine-tuned checkpoint, of the same kind as the one it began with."""
        return self.path / "model"

    def start(self, settings: FinetuneSettings, checkpoint: Path, identity: Mapping[str, Any]) -> None:
        """Empties the folder of the fine-tuning before, and writes the settings."""
        self.empty()
        self.write_config({"checkpoint": str(checkpoint), **identity}, settings.to_dict())

    def check_same(self, settings: FinetuneSettings, identity: Mapping[str, Any]) -> Path | None:
        """The newest checkpoint from which this fine-tuning goes on; None where it has none yet.

        Raises:
            ValueError: where the folder holds no fine-tuning, or a finished or another one.
        """
        about, saved = self._read()
        if about is None:
            raise ValueError(f"{self.path} holds no fine-tuning to go on with: leave out --resume to start one")
        if self.metrics.exists():
            raise ValueError(f"the fine-tuning in {self.path} is finished: nothing is left to do")
        then = {**saved, **about}
        now = {**settings.to_dict(), **identity}
        if changed := [
            f"{name} was {then.get(name)} and is {now[name]}" for name in now if then.get(name) != now[name]
        ]:
            raise ValueError(f"the fine-tuning in {self.path} was started otherwise: {'; '.join(changed[:3])}")
        return self.newest_checkpoint(None)

    def _what_it_holds(self) -> str:
        end = "a finished fine-tuning" if self.metrics.exists() else "a fine-tuning that did not finish (--resume)"
        return f"{self.path} holds {end}: choose another folder with --out, or replace it with --overwrite"
