"""Which model this machine gets, as a local folder that `from_pretrained` takes: `models.find("auto").path`."""

from helpers.models import decoder  # noqa: F401
from helpers.models.base import (  # noqa: F401 - what notebooks and the other modules take from here
    AUTO_GPU,
    GEOMETRY,
    MISTRAL,
    OFFLINE,
    QWEN,
    SMOLLM2,
    Damaged,
    Found,
    HubUnreachable,
    ModelError,
    building,
    cache,
    compute_in,
    cpu_multiplies_bfloat16,
    require_disk,
    require_ram,
)
from helpers.models.choose import find  # noqa: F401
from helpers.models.geometry import mistral_config, qwen_config, smollm2_config  # noqa: F401
from helpers.models.integrity import check_folder, is_model  # noqa: F401
