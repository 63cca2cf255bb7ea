# CHEX on SSD300 with ResNet-50, COCO 2017. Published (command of the authors' README): S = 0.5, 0.2 regrown at first,
# updates every 2 epochs until 470, spatial information as the criterion, regrowing uniformly at random, and the
# schedule in the base; AP 25.9. Ours: MMDetection's augmentations, and widths that are multiples of 8 (round_to). For a
# budget in MACs write target=dict(macs=0.5).
_base_ = "./_base_/ssd_r50_650e.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="CHEX",
        target=dict(channels=0.5),
        initial_regrow=0.2,
        interval=2,
        end=470,
        criterion="si",
        allocation="gamma",
        regrow_allocation="uniform",
        regrow="uniform",
    ),
    scope="backbone",
    input_size=300,
)
custom_hooks = [*_base_.custom_hooks, dict(type="prune_mm.PruningHook")]
