"""Say in JSON what discovery, probes and selection make of all installed backends."""

import json
import sys

from torchport.errors import TorchportError
from torchport.plan.discovery import discover
from torchport.plan.selection import Request, plan
from torchport.plugin import BackendSpec, Topology

VENDORS = {
    "habana_frameworks", "intel_extension_for_pytorch", "pynvml", "torch_mlu", "torch_musa",
    "torch_neuronx", "torch_npu", "torch_sdaa", "torch_tpu", "torch_xla",
}  # fmt: skip


def loaded() -> list[str]:
    return sorted((VENDORS | {"torch"}) & sys.modules.keys())


def in_words(error: TorchportError) -> dict[str, str]:
    return {"problem": error.problem, "found": error.found, "reason": error.reason, "hint": error.hint}


installed = discover({})
answer = {"loaded by discovery": loaded(), "failures": [str(failure) for failure in installed.failures]}
specs = installed.specs("backend")
probes, importing = {}, {}
for spec in specs:
    before = set(loaded())
    probes[spec.name] = installed.probe(spec)
    importing[spec.name] = sorted(set(loaded()) - before)
answer["probes"] = {name: [probe.available, probe.reason] for name, probe in probes.items()}
absent = [name for name, probe in probes.items() if not probe.available]
answer["loaded by probes"] = {name: importing[name] for name in absent if importing[name]}

made = plan(Request(), {}, installed, Topology())
answer["chosen"] = made.backend
answer["rejected"] = [[rejected.name, rejected.reason] for rejected in made["backend"].rejected]
answer["asked"] = {}
for name in absent:
    try:
        plan(Request(), {"TORCHPORT_BACKEND": name}, installed, Topology())
    except TorchportError as error:
        answer["asked"][name] = {key: value for key, value in in_words(error).items() if key != "found"}

import torch  # noqa: E402
from torchport.runtime import check_device_type  # noqa: E402

if torch._C._get_privateuse1_backend_name() == "privateuseone":
    torch.utils.rename_privateuse1_backend("firstvendor")
answer["first vendor"] = torch._C._get_privateuse1_backend_name()
check_device_type(BackendSpec(name="first", factory="a:B", probe="a:p", device_type=answer["first vendor"]))
check_device_type(BackendSpec(name="known", factory="a:B", probe="a:p", device_type="cuda"))
try:
    check_device_type(BackendSpec(name="second", factory="a:B", probe="a:p", device_type="secondvendor"))
except TorchportError as error:
    answer["second vendor"] = in_words(error)
print(json.dumps(answer))
