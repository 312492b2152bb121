"""Tasks that learn from the trainer's datamodule what their images are: under TorchGeo's command line, or in Python."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import replace

from lightning.pytorch import LightningDataModule
from torchgeo.tasks import BaseTask

from geoexplora.bands import SENSORS
from geoexplora.errors import ConfigError
from geoexplora.tasks.torchgeo_data import Batch, BatchAdapter
from geoexplora.tasks.torchgeo_input import DataImages, DataInput
from geoexplora.transforms.normalization import Normalization
from geoexplora.weights.files import read_weights
from geoexplora.weights.spec import EncoderSpec

log = logging.getLogger(__name__)


class DataTask(BaseTask):
    """Builds its models as soon as bands and normalization are known, and takes batches of any datamodule.

    Hyper-parameters read here: ``sensor``, ``bands``, ``normalization``, ``groups``, ``antialias``, ``image_size`` and
    ``init``. Where bands or normalization are not given, they are settled in ``setup``: those that the source weights
    were trained with, if these are of the sensor of the data; else those of the datamodule. They are recorded in
    ``hparams``, so that checkpoints load without data.

    A subclass writes ``build_models``, which sets ``spec``, and begins each step by ``batch = self.adapted(batch)``.
    """

    resizes = True
    """Whether images come at the size ``image_size``; else at their own, made square."""

    spec: EncoderSpec
    adapter: BatchAdapter | None = None

    @abstractmethod
    def build_models(self) -> None:
        """Build the models and set ``spec``, with all hyper-parameters known."""

    def configure_models(self) -> None:
        """Build the models, unless what they take is not known yet."""
        if self.hparams["normalization"] and not self.hparams["bands"]:
            self.hparams.update(bands=list(self.hparams["normalization"]["bands"]))
        if self.hparams["bands"] and self.hparams["normalization"]:
            self.build_models()

    def setup(self, stage: str) -> None:
        """Settle what the images are, build what waited for it, and get ready for batches of this datamodule.

        Args:
            stage: Lightning's.

        Raises:
            ConfigError: if the datamodule does not give what the task takes.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if not hasattr(self, "spec"):
            found = self.resolve_input(datamodule)
            log.info("%s of %s, %s", ",".join(found.bands), found.sensor.name, found.normalization.method)
            self.hparams.update(
                sensor=found.sensor.name, bands=list(found.bands), normalization=found.normalization.to_dict()
            )
            self.build_models()
        if not self.spec.normalization and datamodule is not None:  # weights that do not tell theirs
            chosen = DataImages.of(datamodule, [self.spec.bands]).normalization().select(self.spec.bands)
            self.spec = replace(self.spec, normalization=chosen.to_dict())
        self.adapter = BatchAdapter(
            datamodule,
            SENSORS[self.spec.sensor],
            Normalization.from_dict(self.spec.normalization),
            image_size=self.spec.image_size if self.resizes else None,
            antialias=self.spec.antialias,
        )

    def on_train_start(self) -> None:
        """Have the loggers note what ``setup`` settled, after Lightning gave them what the task was built with."""
        super().on_train_start()
        for logger in self.trainer.loggers:
            logger.log_hyperparams({name: self.hparams[name] for name in ("sensor", "bands", "normalization")})

    def teardown(self, stage: str) -> None:
        """Leave the datamodule as it was."""
        if self.adapter is not None:
            self.adapter.restore()
            self.adapter = None

    def adapted(self, batch: Batch) -> Batch:
        """A batch as the models take it; to be called once, first in each step."""
        return batch if self.adapter is None else self.adapter(batch)

    def resolve_input(self, datamodule: LightningDataModule | None) -> DataInput:
        """What the images are to be, where the hyper-parameters leave it open.

        Args:
            datamodule: the trainer's.

        Raises:
            ConfigError: if there is no datamodule that tells, a band is not there, or statistics are needed that the
                datamodule does not have.
        """
        h = self.hparams
        if datamodule is None:
            raise ConfigError(
                "neither bands and normalization nor a datamodule are given",
                "Fit with a datamodule, or set the task's sensor, bands and normalization.",
            )
        source = None if h["init"] is None else read_weights(h["init"]).spec
        images = DataImages.of(datamodule, h["groups"])
        if source is not None and source.sensor == images.sensor.name and source.normalization:
            contract = Normalization.from_dict(source.normalization)
            wanted = images.sensor.select(h["bands"]) if h["bands"] else images.bands if h["groups"] else contract.bands
            if set(wanted) <= set(contract.bands):
                return DataInput(images.sensor, wanted, contract.select(wanted))
        bands = images.sensor.select(h["bands"]) if h["bands"] else images.bands
        absent = [band for band in bands if band not in images.bands]
        if absent:
            raise ConfigError(
                f"the datamodule's images have no band {', '.join(absent)}", f"They have: {', '.join(images.bands)}."
            )
        return DataInput(images.sensor, bands, images.normalization().select(bands))
