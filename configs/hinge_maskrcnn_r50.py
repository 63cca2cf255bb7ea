# Hinge on Mask R-CNN R50-FPN, COCO 2017: the 1x1 convolutions of the bottlenecks are the matrices. The paper prunes
# classifiers only, so target and schedule are ours: MMDetection's trained model is searched for at most 30k iterations
# of 32 images, its cost looked at every 500, the matrices at the usual learning rate and everything else at a tenth of
# it; then the compact model trains for 90k. No stage is frozen and norms train (SyncBN): a frozen first stage would
# keep its MACs, the most of all, and what is left of a network wants other statistics.
_base_ = "./_base_/maskrcnn_r50_270k.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="Hinge",
        target=dict(macs=0.5),
        strength=5e-3,
        threshold=1e-2,
        same_ratio=True,
        layer_balancing=True,
        relative_threshold=True,
        epoch_iters=500,
    ),
    scope="backbone",
    input_size=(800, 1344),
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
load_from = (
    "https://download.openmmlab.com/mmdetection/v2.0/mask_rcnn/mask_rcnn_r50_fpn_2x_coco/"
    "mask_rcnn_r50_fpn_2x_coco_bbox_mAP-0.392__segm_mAP-0.354_20200505_003907-3e542a40.pth"
)

train_cfg = dict(max_iters=30000, val_interval=5000)
optim_wrapper = dict(
    optimizer=dict(lr=4e-3),
    paramwise_cfg=dict(
        _delete_=True,
        custom_keys={
            "backbone.conv1.weight": dict(lr_mult=1),
            ".conv1.weight": dict(lr_mult=10),
            ".conv3.weight": dict(lr_mult=10),
        },
    ),
)
param_scheduler = [dict(type="LinearLR", start_factor=1.0 / 3.0, by_epoch=False, begin=0, end=500)]
finetune = dict(
    train_cfg=dict(max_iters=90000, val_interval=10000),
    optim_wrapper=dict(optimizer=dict(lr=0.04), paramwise_cfg=dict(bias_lr_mult=2.0, bias_decay_mult=0.0)),
    param_scheduler=[
        dict(type="LinearLR", start_factor=1.0 / 3.0, by_epoch=False, begin=0, end=500),
        dict(type="MultiStepLR", begin=0, end=90000, by_epoch=False, milestones=[60000, 80000], gamma=0.1),
    ],
)
default_hooks = dict(checkpoint=dict(interval=2500))
