"""`experimental.custom_import = "unrecorded"`, for measurements: as "variants", without what the plugin attaches to a run.

    python scripts/compare_throughput.py debug --converters bf16 bf16,experimental.custom_import=unrecorded

Neither metrics.jsonl nor health: the difference is what the hooks cost.
"""

import variants  # noqa: F401

from blockfp8_titan import metrics

metrics.is_recorded = lambda job_config: False
