# CHEX on SSD300 with ResNet-50, COCO 2017, as published: S = 0.5, spatial information as the criterion, regrowing
# uniformly at random. For a budget in MACs write target=dict(macs=0.5).
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
