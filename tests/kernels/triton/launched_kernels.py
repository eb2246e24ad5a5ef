"""Write how every kernel of a block is specialised for several numbers of tokens in each row of the tables.

A program of its own, without triton's interpreter: `test_warmup` runs it.
"""

import json
import sys

import torch
from moe_kernels.triton_kernels.block import mix_as_chosen
from moe_kernels.triton_kernels.dispatch import Device, choose, format_of, limits
from moe_kernels.triton_kernels.launches import recorded_launches
from moe_kernels.triton_kernels.router import choose_experts
from moe_kernels.triton_kernels.weight_forms import empty_weights

HIDDEN, INNER, EXPERTS, TOP_K = 512, 768, 8, 2
META = torch.device("meta")


def keys(form: str, dtype: torch.dtype, tokens: int, device: Device) -> list[str]:
    """Return names and keys of what a call launches."""
    choice = choose(tokens, format_of(form, dtype), HIDDEN, INNER, device)
    weights = [
        empty_weights(form, EXPERTS, *shape, dtype, 128, META)  # type: ignore[arg-type]
        for shape in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    ]
    hidden = torch.empty(tokens, HIDDEN, dtype=dtype, device=META)
    slot_map = torch.empty(EXPERTS, dtype=torch.int64, device=META)
    with recorded_launches(device.arch) as launches:
        index, weight = choose_experts(hidden.new_empty(tokens, EXPERTS), TOP_K)
        novices = [hidden.new_empty(3, HIDDEN)]
        mix_as_chosen(choice, hidden, index, weight, slot_map, *weights, novices, None, hidden)
    return [f"{launch.name} {launch.key}" for launch in launches]


def main() -> None:
    device = Device(int(sys.argv[1]))
    found: dict[str, list[dict[int, list[str]]]] = {}
    for form in ("dense", "int4", "sparse24"):
        for dtype in (torch.bfloat16, torch.float32):
            rows = found.setdefault(f"{form} {str(dtype).removeprefix('torch.')}", [])
            least = 1
            for limit in limits(format_of(form, dtype), device):
                # 1 and multiples of 16 are what triton would specialise.
                most = limit or 1024
                numbers = {least, least + 1, (least + most) // 2, most}
                assert len(numbers) == 4
                rows.append({number: keys(form, dtype, number, device) for number in sorted(numbers)})
                least = most + 1
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
