# CHEX on Mask R-CNN R50-FPN, COCO 2017, as published: S = 0.5, every layer the same share, an update every 1000
# iterations until 75 % of the training. For a budget in MACs write target=dict(macs=0.5).
_base_ = "./_base_/maskrcnn_r50_270k.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="CHEX",
        target=dict(channels=0.5),
        initial_regrow=0.5,
        interval=1000,
        end=202500,
        by_epoch=False,
        allocation="uniform",
        regrow_allocation="uniform",
        regrow="uniform",
    ),
    scope="backbone",
    input_size=(800, 1344),
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
