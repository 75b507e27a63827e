"""What goes wrong with a model on disk.

ModelError
├── UnsupportedModel     an architecture or format that is not served; the message lists what is
└── BrokenCheckpoint     files missing, tensors missing, left over, or of the wrong shape
"""


class ModelError(ValueError):
    """Base; the message names the file or field and what to do."""


class UnsupportedModel(ModelError):
    """The architecture, format or option is not one that this package knows."""


class BrokenCheckpoint(ModelError):
    """The checkpoint contradicts itself or is incomplete."""
