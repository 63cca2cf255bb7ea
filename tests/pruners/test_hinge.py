"""Hinge as a whole: where its matrices are, what a step does to them, what goes in the end."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from backbones.published_counts import count
from pruners.hinge_networks import (
    IMAGE,
    Basic,
    Small,
    attached,
    begun,
    published,
    watched,
)
from torch import nn

from prune_mm.analysis.complexity import layer_positions
from prune_mm.pruners.hinge_math import group_norms
from prune_mm.structures import LowRank, Plan
from prune_mm.structures.pair import pair_matrix
from prune_mm.structures.plan import count_macs

# -- placement --------------------------------------------------------------------------------------------------------


class TestPlacement:
    """Which matrices there are (spec, section 2): name, axis of the groups in the 1x1 kernel, first or second."""

    @staticmethod
    def units(name, **options):
        _, module, pruner = published(name, **options)
        found = []
        for unit in pruner.units:
            shapes = [tuple(module.get_parameter(tensor).shape[:2]) for tensor, _ in unit.matrices]
            found.append((unit, [(name.removesuffix(".weight"), axis) for name, axis in unit.matrices], shapes))
        return pruner, found

    def test_vgg_has_both_axes(self):
        pruner, found = self.units("vgg16_linear3_cifar10", whole=False, placement="both")
        widths = [64, *[128] * 2, *[256] * 3, *[512] * 6]
        assert [(pair.rank, pair.outputs) for pair in pruner.pairs.values()] == [(n, n) for n in widths]
        axes = [axis for _, [(_, axis)], _ in found]
        assert axes == [1, 0] * 11 + [1], "rows, then columns; columns of the last are the classifier's inputs"
        assert [unit.is_rows for unit, _, _ in found] == [axis == 1 for axis in axes]
        assert {unit.which for unit, _, _ in found} == {1}
        assert pruner.left_dense == {"features.0": "reads the input of the scope"}

    @pytest.mark.parametrize(("name", "blocks"), [("resnet20_pad_cifar10", 3), ("resnet56_pad_cifar10", 9)])
    @pytest.mark.parametrize("placement", ["auto", "rows"])
    def test_basic_blocks(self, name, blocks, placement):
        _, found = self.units(name, whole=False, placement=placement)
        names = [f"layer{stage}.{b}.conv{c}.pair" for stage in (1, 2, 3) for b in range(blocks) for c in (1, 2)]
        first = 0 if placement == "auto" else 1
        assert [matrices for _, matrices, _ in found] == [[(n, first if "conv1" in n else 1)] for n in names]
        assert [unit.which for unit, _, _ in found] == [1, 2] * (3 * blocks)
        assert [unit.follows for unit, _, _ in found][1::2] == list(range(0, 6 * blocks, 2))
        assert [shapes[0] for _, _, shapes in found] == [(n, n) for n in (16, 32, 64) for _ in range(2 * blocks)]

    def test_wide_blocks(self):
        pruner, found = self.units("wrn16_10_cifar100", whole=False, placement="auto", init_method="p-identity")
        assert [axis for _, [(_, axis)], _ in found] == [0, 1] * 6
        assert [unit.which for unit, _, _ in found] == [1, 2] * 6
        assert [shapes[0] for _, _, shapes in found] == [(n, n) for n in (160, 320, 640) for _ in range(4)]
        assert not any("downsample" in name for name in pruner.pairs)

    def test_bottlenecks_have_their_own(self):
        pruner, found = self.units("resnet164_cifar10", whole=False, placement="auto")
        assert pruner.pairs == {}
        assert len(found) == 108
        assert found[0][1:] == ([("layer1.0.conv1", 0)], [(16, 16)])
        assert found[1][1:] == ([("layer1.0.conv3", 1)], [(64, 16)])
        assert found[2][1:] == ([("layer1.1.conv1", 0)], [(16, 64)])
        assert found[-2][1:] == ([("layer3.17.conv1", 0)], [(64, 256)])
        assert found[-1][1:] == ([("layer3.17.conv3", 1)], [(256, 64)])
        assert [unit.which for unit, _, _ in found] == [1, 2] * 54

    @pytest.mark.parametrize(("depth", "blocks"), [(20, 2), (164, 18)])
    def test_cardinality_groups_go_as_a_whole(self, depth, blocks):
        _, found = self.units(f"resnext{depth}_cifar10", whole=False, placement="auto")
        names = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(blocks)]
        assert [matrices for _, matrices, _ in found] == [[(f"{n}.conv1", 0), (f"{n}.conv3", 1)] for n in names]
        assert {unit.channels for unit, _, _ in found} == {32}
        sizes = [(a[0] * a[1] + b[0] * b[1]) // 32 for _, _, (a, b) in found]
        middle = blocks - 1
        assert sizes == [128] * blocks + [384] + [512] * middle + [1536] + [2048] * middle

    @pytest.mark.parametrize("placement", ["auto", "rows"])
    def test_densenet(self, placement):
        pruner, found = self.units("densenet40_cifar10", whole=False, placement=placement, pair_pointwise=True)
        assert [pair.outputs for pair in pruner.pairs.values()] == [*[12] * 12, 168, *[12] * 12, 312, *[12] * 12]
        # The last stage's outputs are the scope's: a classifier reads them, and rows go instead.
        axes = [0] * 25 + [1] * 13 if placement == "auto" else [1] * 38
        assert [axis for _, [(_, axis)], _ in found] == axes
        assert {unit.which for unit, _, _ in found} == {1}

    def test_fewer_rows_than_outputs(self):
        """A filter of fewer weights than there are outputs has no more singular values."""
        module = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 24, 3), nn.ReLU(), nn.Conv2d(24, 4, 3))
        pruner = attached(module, placement="rows", target={"macs": 0.9})
        assert {name: (pair.rank, pair.outputs) for name, pair in pruner.pairs.items()} == {"2": (18, 24), "4": (4, 4)}

    def test_outputs_that_a_grouped_convolution_ties(self):
        """Three groups tie output 0 to 2 and 4: a column of A is no group there, and rows go instead."""
        module = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3)
        )
        pruner = attached(module, target={"macs": 0.9})
        assert [(unit.name, unit.is_rows) for unit in pruner.units] == [("2", True)]
        assert "has 3 groups" in pruner.left_dense["4"]

    def test_ignored_and_frozen_layers(self):
        module = Basic()
        pruner = attached(module, ignore=["blocks.0"], target={"macs": 0.8})
        assert list(pruner.pairs) == ["blocks.1.conv1", "blocks.1.conv2"]
        assert pruner.left_dense["blocks.0.conv1"] == "ignored"
        module = Basic()
        module.blocks[0].requires_grad_(False)
        pruner = attached(copy.deepcopy(module), target={"macs": 0.8})
        assert list(pruner.pairs) == ["blocks.1.conv1", "blocks.1.conv2"]
        assert "include_frozen=True" in pruner.left_dense["blocks.0.conv1"]
        pruner = attached(module, include_frozen=True)
        assert len(pruner.pairs) == 4
        assert not module.blocks[0]["conv1"].pair.weight.requires_grad

    def test_frozen_bottlenecks(self):
        module = torchvision.models.resnet50()
        module.layer1.requires_grad_(False)
        pruner = attached(module, target={"macs": 0.7})
        assert len(pruner.units) == 2 * (4 + 6 + 3)
        assert "include_frozen=True" in pruner.left_dense["layer1.0.conv1"]
        assert len(attached(module, target={"macs": 0.7}, include_frozen=True).units) == 32


# -- counts -----------------------------------------------------------------------------------------------------------


def half(unit, share=None):
    """Every second group stays, or the first ones."""
    mask = torch.zeros(unit.channels, dtype=torch.bool)
    mask[::2] = True
    return mask if share is None else torch.arange(unit.channels) < round(share * unit.channels)


def never(conv):
    return False


class TestPublishedCounts:
    """Spec 16.2. The counter sees convolutions, the classifier, norms and ReLU modules.

    Two of its figures mean something else here, by intent: the ReLU inside a basic block stays one (the original makes
    it a two-slope one, of 2 more parameters, which its counter does not see); and what removed channels still emit is
    carried on by default, which costs one channel a layer (carry_constants=False here).
    """

    @staticmethod
    def compact(name, placement, masks, merge=None, **options):
        """A classifier as compacted by masks; ``merge`` says which pairs are merged: as decided here, or by name."""
        whole = name.startswith("densenet40") and placement == "auto"
        model, net, pruner = copy.deepcopy(published(name, whole=whole, placement=placement, **options))
        if masks is not None:
            decision = {unit.name: masks(unit) for unit in pruner.units}
            silent = {f"V:{name}": mask for name, mask in decision.items()}
            pruner.commit(net, {"threshold": torch.tensor(0.0), **decision, **silent}, 0)
            stage = pruner.structures()
            if merge is not None:
                stage = [replace(s, merge=merge(s.name)) if isinstance(s, LowRank) else s for s in stage]
            Plan("", (tuple(stage),)).compact(net)
            if merge is None:
                shapes = {key: tuple(p.shape) for key, p in net.named_parameters()}
                counts = pruner.counts()
                assert pruner.cost.macs(counts) == count_macs(shapes, layer_positions(net, torch.randn(1, 3, 32, 32)))
                assert pruner.cost.params(counts) == sum(p.numel() for p in net.parameters())
        return model.to("meta")

    @staticmethod
    def figures(model, name):
        found = count(model, 32)
        flops, params = found.hinge, found.params
        if name.startswith(("wrn", "resnext")):
            flops -= found.relus  # functional in the original, which its counter does not see
        if name.endswith("_pad_cifar10"):
            for number, side in ((1, 32), (2, 16), (3, 8)):
                blocks = getattr(model.backbone, f"layer{number}")
                flops -= sum(block.bn1.weight.numel() for block in blocks) * side**2
                params += 2 * len(blocks)
        return flops, params

    CASES = (
        ("vgg16_linear3_cifar10", "both", {}, (355_449_856, 17_059_914), (100_594_688, 4_742_890), None),
        ("resnet20_pad_cifar10", "rows", {}, (45_748_864, 302_012), (23_335_552, 152_252), None),
        ("resnet56_pad_cifar10", "rows", {}, (140_980_864, 949_856), (71_381_632, 477_536), None),
        ("resnet20_pad_cifar10", "auto", {}, (45_748_864, 302_012), (27_378_304, 176_684), (16_761_472, 107_564)),
        ("resnet56_pad_cifar10", "auto", {}, (140_980_864, 949_856), (85_869_184, 573_872), (51_659_392, 343_472)),
        ("resnet164_cifar10", "auto", {}, (257_325_568, 1_704_154), (102_892_032, 665_370), None),
        ("resnext20_cifar10", "auto", {}, (36_817_408, 211_850), (20_949_504, 129_130), None),
        ("resnext164_cifar10", "auto", {}, (259_639_808, 1_713_546), (134_195_712, 887_146), None),
        ("wrn16_10_cifar100", "auto", {"init_method": "p-identity"}, (3_594_942_976, 19_330_340),
         (2_296_388_096, 10_994_180), (1_301_551_616, 6_873_860)),
        ("densenet40_cifar10", "rows", {"pair_pointwise": True}, (346_249_680, 1_190_050),
         (177_053_136, 606_994), None),
        ("densenet40_cifar10", "auto", {"pair_pointwise": True}, (346_249_680, 1_190_050), (191_925_480, 613_234),
         (84_296_424, 280_234)),
    )  # fmt: skip

    @pytest.mark.parametrize(("name", "placement", "options", "whole", "pairs", "merged"), CASES)
    def test_half_of_everything(self, name, placement, options, whole, pairs, merged):
        for masks, merge, expected in ((None, None, whole), (half, never, pairs), (half, None, merged)):
            if expected is not None:
                assert self.figures(self.compact(name, placement, masks, merge, **options), name) == expected

    @pytest.mark.parametrize(
        ("name", "options", "expected"),
        [
            ("resnet20_pad_cifar10", {}, (43_389_568, 285_884)),
            ("resnet56_pad_cifar10", {}, (133_902_976, 901_472)),
            ("wrn16_10_cifar100", {"init_method": "p-identity"}, (3_280_370_176, 18_255_140)),
        ],
    )
    def test_nothing_gone(self, name, options, expected):
        """As published only the pairs that lose columns are merged; here those of full rank as well: the dense cost."""

        def everything(unit):
            return half(unit, 1.0)

        model = self.compact(name, "auto", everything, lambda conv: conv.endswith("conv1"), **options)
        assert self.figures(model, name) == expected
        model = self.compact(name, "auto", everything, **options)
        assert not any("pair" in key for key in model.state_dict())

    @pytest.mark.parametrize(
        ("name", "placement", "shares", "options"),
        [
            ("resnet56_pad_cifar10", "rows", {0.25: (0.2879, 0.2830), 0.75: (0.8355, 0.8367)}, {}),
            ("resnet164_cifar10", "auto", {0.25: (0.1926, 0.1815), 0.75: (0.6690, 0.6633)}, {}),
            ("resnext20_cifar10", "auto", {0.25: (0.3535, 0.4143), 0.75: (0.7845, 0.8048)}, {}),
            ("densenet40_cifar10", "rows", {0.25: (0.3187, 0.2978), 0.75: (0.9019, 0.8482)},
             {"pair_pointwise": True}),
            ("wrn16_10_cifar100", "auto", {0.25: (0.1849, 0.1745), 0.75: (0.7052, 0.6961)},
             {"init_method": "p-identity"}),
        ],
    )  # fmt: skip
    def test_other_shares(self, name, placement, shares, options):
        dense = {
            "resnet56_pad_cifar10": (127_083_136, 853_034),
            "resnet164_cifar10": (257_325_568, 1_704_154),
            "resnext20_cifar10": (36_817_408, 211_850),
            "densenet40_cifar10": (290_105_808, 1_059_298),
            "wrn16_10_cifar100": (3_123_083_776, 17_179_940),
        }[name]
        for share, expected in shares.items():
            merge = None if name.startswith("wrn") else never
            model = self.compact(name, placement, lambda unit, at=share: half(unit, at), merge, **options)
            found = self.figures(model, name)
            assert [a / b for a, b in zip(found, dense)] == pytest.approx(expected, abs=6e-5)


# -- steps ------------------------------------------------------------------------------------------------------------


class TestSteps:
    @pytest.mark.parametrize(
        ("placement", "regularizer", "steps", "expected"),
        [
            ("rows", "l1", 1, [[1.46883926, 0.29597452, 1.02067159], [2.09311996, 1.68573639, -0.84525542],
                               [0.7277357, -0.12782118, -0.08167334]]),
            ("rows", "l1", 3, [[0.6228092, 0.22860781, 1.0422393], [2.43517384, 1.30242028, -0.42682471],
                               [0.39789587, -0.10182722, -0.03373762]]),
            ("rows", "l1d2", 3, [[0.94750774, 0.31035936, 1.38845846], [2.8495202, 1.57919149, -0.54740585],
                                 [0.82365805, -0.19596075, -0.08445451]]),
            ("auto", "l1", 3, [[0.76651985, 0.21978521, 0.94661303], [2.41367209, 1.03983583, -0.2850304],
                               [0.79295698, -0.15817856, -0.05822947]]),
            ("both", "l1", 3, [[0.3897334, 0.12948802, 0.53017929], [1.89436526, 0.72883408, -0.15425173],
                               [0.26987035, -0.05741238, -0.01053338]]),
        ],
    )  # fmt: skip
    def test_published_iterations(self, placement, regularizer, steps, expected):
        """Spec 16.4, with a real optimizer whose steps the pruner sees: auto means columns here."""
        module = Small().double()
        pruner = begun(module, IMAGE[:1].double(), placement=placement, regularizer=regularizer, strength=2.0,
                       ignore=["b"], lr_adjust=None, target={"macs": 1.0})  # fmt: skip
        weight = module.a.pair.weight
        matrix = pair_matrix(weight.data)
        matrix.copy_(torch.from_numpy(np.random.RandomState(0).randn(3, 3)))
        optimizer = watched(pruner, module, torch.optim.SGD([weight], 0.1, momentum=0.9, weight_decay=1e-4))
        for step in range(steps):
            gradient = torch.from_numpy(np.random.RandomState(10 + step).randn(3, 3))
            weight.grad = gradient.T.reshape(weight.shape)
            optimizer.step()
        torch.testing.assert_close(matrix, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)

    @pytest.mark.parametrize(
        ("method", "ratio", "rates"),
        [
            ("p1", 0.01, [0.002211148, 0.221114835, 0.1]),
            ("p1", 100.0, [0.000452254, 0.045225369, 0.1]),
            ("p1", 1.2, [0.000781817, 0.078181737, 0.1]),
            ("p2", 0.01, [0.001, 0.1, 0.045225369]),
            ("p2", 100.0, [0.001, 0.1, 0.221114835]),
            ("p2", 1.2, [0.001, 0.1, 0.127907109]),
        ],
    )
    def test_learning_rates_follow_the_gradients_for_one_step(self, method, ratio, rates):
        """Spec 16.7; the first ratio is clipped, too, and schedulers find the rates they set."""
        module = Basic(blocks=1)
        pruner = begun(module, lr_adjust=method, target={"macs": 0.9})
        first, second = (module.blocks[0][name].pair.weight for name in ("conv1", "conv2"))
        rest = [p for p in module.parameters() if p is not first and p is not second]
        optimizer = torch.optim.SGD([{"params": rest, "lr": 1e-3}, {"params": [first]}, {"params": [second]}], lr=0.1)
        watched(pruner, module, optimizer)
        seen = []
        optimizer.register_step_pre_hook(lambda used, *_: seen.append([group["lr"] for group in used.param_groups]))
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.1)
        # Sums over groups of norms: columns of the first matrix, rows of the second.
        first.grad, second.grad = torch.zeros_like(first), torch.zeros_like(second)
        first.grad[:, 0], second.grad[0] = ratio, 1.0
        for step in range(3):
            optimizer.step()
            assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
                [0.001, 0.1, 0.1] if step < 2 else [0.0001, 0.01, 0.01]
            )
            scheduler.step()
        assert seen[0] == pytest.approx(rates, abs=1e-8)
        assert seen[2] == pytest.approx([rate / 10 for rate in rates], abs=1e-8)
        assert float(pruner.ratio) == pytest.approx(min(max(ratio, 5 / 9), 9 / 5))

    def test_the_ratio_has_a_memory(self):
        module = Basic(blocks=1)
        pruner = begun(module, target={"macs": 0.9})
        first, second = (module.blocks[0][name].pair.weight for name in ("conv1", "conv2"))
        optimizer = watched(pruner, module, torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=0.1))
        for ratio, expected in ((1.2, 1.2), (0.8, 0.1 * 1.2 + 0.9 * 0.8), (math.nan, 0.84)):
            first.grad, second.grad = torch.zeros_like(first), torch.zeros_like(second)
            first.grad[:, 0], second.grad[0] = ratio, 1.0
            pruner.before_step(module, optimizer)
            assert float(pruner.ratio) == pytest.approx(expected, rel=1e-6)

    def test_matrices_need_groups_of_their_own(self):
        module = Basic(blocks=1)
        pruner = begun(module, target={"macs": 0.9})
        together = torch.optim.SGD(module.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=r"custom_keys=.*blocks\.0\.conv1\.pair\.weight.*or lr_adjust=None"):
            pruner.check_optimizer(module, together)
        each = torch.optim.SGD([{"params": [p]} for p in module.parameters()], lr=0.1)
        pruner.check_optimizer(module, each)
        begun(Basic(blocks=1), target={"macs": 0.9}, lr_adjust=None).check_optimizer(module, together)
        chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))
        pruner = attached(chain, target={"macs": 0.9})
        pruner.check_optimizer(chain, torch.optim.SGD(chain.parameters(), lr=0.1))

    @pytest.mark.parametrize("interval", [1, 3])
    def test_a_group_can_come_back_until_the_end(self, interval):
        module = Small(width=6)
        pruner = begun(module, strength=100.0, ignore=["b"], prox_interval=interval, target={"macs": 0.9})
        weight = module.a.pair.weight
        optimizer = watched(pruner, module, torch.optim.SGD([weight], 0.1))
        for step in range(1, 7):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
            assert bool(weight.any()) == (step < interval)
        pruner.lambda_ = 1e-9
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert bool(weight.all())

    def test_annealing(self):
        """Spec 16.6, with the penalty averaged over the first matrices."""
        module = Basic(blocks=2)
        options = {"annealing": {"factor": 2, "high": 10, "low": 5}, "target": {"macs": 0.9}}
        pruner = begun(module, **options)
        for mean, strength in ((11, 2e-4), (10, 1e-4), (7, 1e-4), (5, 5e-5), (4, 5e-5), (12, 2e-4)):
            for block, share in zip(module.blocks, (0.5, 1.5)):
                matrix = pair_matrix(block["conv1"].pair.weight.data)
                matrix.copy_(torch.eye(8) * mean * share / 8)
            assert pruner._strength(module) == pytest.approx(strength)
        off = begun(Basic(), target={"macs": 0.9})
        assert off._strength(module) == 2e-4

    def test_resnet20_of_the_published_search(self):
        """Spec 16.10: balance factors, penalties, and one balanced step through a real optimizer."""
        _, module, pruner = copy.deepcopy(
            published("resnet20_pad_cifar10", whole=False, placement="rows", layer_balancing=True, strength=0.02)
        )
        state = np.random.RandomState(0)
        for name, conv in module.named_modules():
            if isinstance(conv, nn.Conv2d) and not name.endswith("pair"):
                outputs = conv.pair.weight.shape[0] if hasattr(conv, "pair") else 16
                shape = (outputs, *conv.weight.shape[1:])
                kernel = torch.from_numpy((state.randn(*shape) * math.sqrt(2 / (outputs * 9)) * 0.2).astype(np.float32))
                conv.weight.data.copy_(kernel)
                if hasattr(conv, "pair"):
                    pair_matrix(conv.pair.weight.data).copy_(torch.eye(outputs))
        pruner.commit(module, pruner.start(module), 0)
        means = [0.271739, 0.279065, 0.275065, 0.274349, 0.27973, 0.27949, 0.19009, 0.277907, 0.280876, 0.279003,
                 0.278033, 0.275052, 0.194171, 0.278224, 0.278295, 0.278882, 0.278739, 0.278216]  # fmt: skip
        assert pruner.balance.tolist() == pytest.approx(means, abs=6e-7)
        norms = group_norms(pruner.units[0].parts(module)).sort(descending=True).values[[0, 1, 14, 15]].tolist()
        assert norms == pytest.approx([0.34808, 0.331813, 0.215934, 0.202528], abs=6e-7)
        for which, value in ((1, 9.4743977), (2, 10.3788748)):
            assert pruner._penalty(module, which) == pytest.approx(value, rel=5e-7)
        pruner.started.fill_(True)
        matrices = [module.get_parameter(name) for unit in pruner.units for name, _ in unit.matrices]
        watched(pruner, module, torch.optim.SGD(matrices, lr=0.1)).step()
        for which, value in ((1, 9.4554481), (2, 10.3581171)):
            assert pruner._penalty(module, which) == pytest.approx(value, rel=5e-7)
