# CHEX on Mask R-CNN R50-FPN, COCO 2017. Published (the authors' config and constants): S = 0.5, every layer the same
# share, 0.5 regrown at first, an update every 1000 iterations until 75 % of the training, and the schedule in the base;
# box AP 37.3, mask AP 34.5 on COCO 2014 minival, the same images. Ours: SyncBN in the backbone and no norms in neck and
# heads, where the authors have group norm, whose channels cannot be cut exactly. For a budget in MACs write
# target=dict(macs=0.5).
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
