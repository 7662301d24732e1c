# SPDX-License-Identifier: Apache-2.0
"""Makes the process-group backend "locmoe" known to `torch.distributed`, and nothing else.

`import torch` loads the entry point `torch.backends` of every installed package, so that no script needs to import us
for the backend's sake. It runs inside that import: a package of its own, since `hf_locmoe` imports transformers, which
would come back to a torch that is not there yet. What the backend is made of is imported when the first group is made.
"""


def register() -> None:
    """Registers the backend, once."""
    import torch.distributed as dist

    if not dist.is_available() or "locmoe" in dist.Backend.backend_list:
        return
    dist.Backend.register_backend("locmoe", _create, extended_api=True, devices=["cpu", "cuda", "xpu"])


def _create(backend_options, options=None):
    from hf_locmoe.distributed.backend import create_process_group

    return create_process_group(backend_options, options)
