"""Empty networks."""

from sd.config import SD15
from sd.models import empty_networks


def test_networks_are_built_without_memory_or_initialisation():
    import subprocess
    import sys

    code = (
        "import sys, torch; from sd.config import SD15; from sd.model_converter import compvis_shapes;"
        "from sd.models import empty_networks;"
        "from sd.adapters.lora import check_shapes; networks = empty_networks(SD15); compvis_shapes(SD15);"
        "check_shapes({'up': torch.empty(4, 2), 'down': torch.empty(2, 3)}, (4, 3));"
        "assert all(p.device.type == 'meta' for n in networks.values() for p in n.parameters());"
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules), 'this loads a compiler'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert sum(p.numel() for p in empty_networks(SD15)["diffusion"].parameters()) == 859_520_964
