"""What became of many matrices, in few words."""

from __future__ import annotations

from moe_lightning.compression import ModuleStatus
from moe_lightning.reporting import matrix_summary, matrix_table, module_line


def module(experts: int = 32, odd: int = 0) -> ModuleStatus:
    names = [f"{expert}.{name}" for expert in range(experts) for name in ("gate_up_proj", "down_proj")]
    matrices = dict.fromkeys(names, "gptq")
    for number, name in enumerate(names[:odd]):
        matrices[name] = f"rtn fallback: {number} tokens"
    errors = {name: 0.001 * (place + 1) for place, name in enumerate(names[odd:])}
    return ModuleStatus("int4", dict.fromkeys(range(experts), 1234), matrices, errors)


def test_statuses_are_counted_by_kind() -> None:
    found = {"a": module(), "b": module(odd=9), "c": ModuleStatus("dropped, the whole layer")}
    assert matrix_summary(found) == "128 matrices: 119 gptq; 9 rtn fallback"
    assert matrix_summary({"c": ModuleStatus("dropped")}) == matrix_table({"c": ModuleStatus("dropped")}) == ""


def damped(numbers: list[str]) -> ModuleStatus:
    return ModuleStatus("int4", {}, {f"{expert}.down_proj": status for expert, status in enumerate(numbers)})


def test_dampings_are_a_range() -> None:
    """Every matrix may have one of its own."""
    many = damped(["gptq", *(f"gptq damp x{1 + expert / 10:.1f}" for expert in range(1, 75))])
    assert matrix_summary({"a": many}) == "75 matrices: 75 gptq, damping x1 to x8.4"
    assert module_line(many) == "int4; 75 gptq, damping x1 to x8.4"
    same = damped(["gptq damp x300", "gptq damp x300"])
    assert matrix_summary({"a": same}) == "2 matrices: 2 gptq, damping x300"
    assert "| a | 75 | gptq, damping x1 to x8.4 |  |" in matrix_table({"a": many})
    odd = damped(["gptq damp x2.4", "gptq", "rtn fallback: its Hessian is not finite"])
    line = "int4; 2 gptq, damping x1 to x2.4; 1 rtn fallback (2.down_proj: rtn fallback: its Hessian is not finite)"
    assert module_line(odd) == line


def test_both_of_two_methods_are_counted() -> None:
    """With the reason of the first one, which stands before the second."""
    twice = "magnitude fallback: 0 tokens, then rtn fallback: 0 tokens"
    found = damped(
        [twice, twice, "sparsegpt damp x2.5, then gptq damp x7.1", "sparsegpt, then gptq", "sparsegpt, then gptq"]
    )
    summary = "5 matrices: 3 sparsegpt then gptq, damping x1 to x7.1; 2 magnitude fallback then rtn fallback"
    assert matrix_summary({"a": found}) == summary
    assert f"(0.down_proj: {twice}; 1.down_proj: {twice})" in module_line(found)
    last = damped(["wanda, then rtn fallback: no input reached it"])
    assert matrix_summary({"a": last}) == "1 matrices: 1 wanda then rtn fallback"


def test_a_line_names_what_is_not_as_usual_and_stays_short() -> None:
    assert module_line(ModuleStatus("dropped")) == "dropped"
    assert module_line(ModuleStatus("2:4", {}, {"q_proj": "magnitude"})) == "2:4; 1 magnitude"
    line = module_line(module(experts=64, odd=9))
    assert line.startswith("int4; 119 gptq; 9 rtn fallback (0.gate_up_proj: rtn fallback: 0 tokens; ")
    assert "; and 3 more)" in line
    assert line.endswith("; relative error 6.00% on average, at most 11.90% (63.down_proj)")
    assert len(line) < 400


def test_the_table_has_a_row_for_each_matrix() -> None:
    text = matrix_table({"model.layers.0.mlp.experts": module(experts=2, odd=1)})
    summary, _, _, _, usual, odd, _, _, _, *rows = text.splitlines()
    assert summary == "4 matrices: 3 gptq; 1 rtn fallback"
    assert usual == "| model.layers.0.mlp.experts | 3 | gptq | 0.300% |"
    assert odd == "| model.layers.0.mlp.experts | 1 | rtn fallback |  |"
    assert rows[0] == "| model.layers.0.mlp.experts | 0.gate_up_proj | 1,234 | rtn fallback: 0 tokens |  |"
    assert rows[1] == "| model.layers.0.mlp.experts | 0.down_proj | 1,234 | gptq | 0.100% |"
    assert len(rows) == 4
    attention = matrix_table({"a": ModuleStatus("2:4", {}, {"q_proj": "wanda"}, {"q_proj": 0.5})})
    assert attention.splitlines()[-1] == "| a | q_proj |  | wanda | 50.000% |"
