"""mmcv's operators on torchvision: how they are installed, and those that are neither boxes, regions nor deformable."""

import copy
import importlib
import pickle
import subprocess
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from mmcv_operators import DOUBLE, ext_loader, ops

from prune_mm.compat import install_mmcv_ops


def test_install_is_idempotent_and_binds_the_submodule():
    import mmcv

    before = sys.modules["mmcv._ext"]
    assert install_mmcv_ops()
    assert sys.modules["mmcv._ext"] is before is mmcv._ext


def test_compiled_module_already_loaded_is_left_alone(monkeypatch):
    compiled = ModuleType("mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv._ext", compiled)
    assert not install_mmcv_ops()
    assert sys.modules["mmcv._ext"] is compiled


def test_compiled_module_on_disk_wins(monkeypatch, tmp_path):
    package = tmp_path / "mmcv"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    for name in [name for name in sys.modules if name.split(".")[0] == "mmcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert install_mmcv_ops()  # no _ext there yet
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    (package / "_ext.py").write_text("")
    importlib.invalidate_caches()  # the finder caches directories by modification time
    assert not install_mmcv_ops()
    assert "mmcv._ext" not in sys.modules


def test_no_mmcv_at_all(monkeypatch):
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv", None)
    assert not install_mmcv_ops()
    assert "mmcv._ext" not in sys.modules


def test_missing_operator_raises_only_when_called():
    module = ext_loader.load_ext("_ext", ["psamask_forward"])
    with pytest.raises(NotImplementedError, match=r"psamask_forward.*MMCV_WITH_OPS"):
        module.psamask_forward(1, two=2)
    with pytest.raises(NotImplementedError, match="box_iou_rotated"):
        ops.box_iou_rotated(torch.rand(1, 5), torch.rand(1, 5))


def test_dunder_names_behave_as_in_any_module():
    module = sys.modules["mmcv._ext"]
    for name in ("__file__", "__path__", "__wrapped__", "__deepcopy__", "_private"):
        assert not hasattr(module, name)
    assert "nms" in dir(module)
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(module)
    with pytest.raises(TypeError, match="pickle"):
        copy.deepcopy(module)


def test_versions_say_that_nothing_was_compiled():
    assert "not compiled" in ops.get_compiler_version()
    assert "not compiled" in ops.get_compiling_cuda_version()
    assert ext_loader.check_ops_exist()


def test_fresh_process_is_cheap_until_mmcv_asks():
    code = (
        "import sys; import prune_mm.compat.mmcv_ext as c; heavy = 'mmcv' in sys.modules; "
        "assert c.install_mmcv_ops() and heavy == ('mmcv' in sys.modules); "
        "import mmcv.ops, mmdet.models; assert mmcv._ext is sys.modules['mmcv._ext']; "
        "from mmdet.registry import MODELS; "
        "assert MODELS.get('MaskRCNN') and MODELS.get('SSDHead'); print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("ok"), done.stderr


@pytest.mark.parametrize("gamma", [2.0, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(gamma, weighted):
    logits = torch.randn(7, 4, dtype=DOUBLE, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 4, 4, 1])  # 4 is the background
    weight = torch.rand(4, dtype=DOUBLE) if weighted else None
    one_hot = F.one_hot(target, 5)[:, :4].to(DOUBLE)
    p = logits.sigmoid()
    alpha = 0.3
    expected = -alpha * (1 - p) ** gamma * p.log() * one_hot
    expected = expected - (1 - alpha) * p**gamma * (1 - p).log() * (1 - one_hot)
    if weighted:
        expected = expected * torch.cat([weight, torch.ones(1, dtype=DOUBLE)])[target][:, None]
    out = ops.sigmoid_focal_loss(logits, target, gamma, alpha, weight, "none")
    torch.testing.assert_close(out, expected)
    upstream = torch.rand_like(out)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), logits)
    (got,) = torch.autograd.grad((out * upstream).sum(), logits)
    torch.testing.assert_close(got, wanted)
    mean = ops.sigmoid_focal_loss(logits, target, gamma, alpha, weight, "mean")
    torch.testing.assert_close(mean, expected.sum() / 7)


def test_sigmoid_focal_loss_is_finite_at_saturation():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    ops.sigmoid_focal_loss(logits, torch.tensor([0]), 0.5, 0.25, None, "sum").backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits))


def test_masked_conv_computes_only_where_the_mask_is():
    layer = ops.MaskedConv2d(3, 4, 3, padding=1)
    x, mask = torch.rand(1, 3, 6, 5), torch.rand(1, 6, 5) > 0.5
    torch.testing.assert_close(layer(x, mask), layer(x) * mask)
