# Hinge on the stock SSD300 (VGG-16), COCO 2017: rows and columns of a matrix behind every convolution of the VGG but
# the first, as published for VGG16 on CIFAR. The paper prunes classifiers only, so target and schedule are ours:
# MMDetection's trained model is searched for at most 6 of its epochs (of 5 passes over the data), the matrices at its
# own learning rate and everything else at a tenth of it (a VGG without norms stands no more); then the compact model
# trains with the stock schedule.
_base_ = "mmdet::ssd/ssd300_coco.py"
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="Hinge",
        target=dict(macs=0.5),
        placement="both",
        strength=0.02,
        threshold=1e-2,
        layer_balancing=True,
        relative_threshold=True,
    ),
    scope="backbone",
    input_size=300,
)
custom_hooks = [*_base_.custom_hooks, dict(type="prune_mm.PruningHook")]
load_from = "https://download.openmmlab.com/mmdetection/v2.0/ssd/ssd300_coco/ssd300_coco_20210803_015428-d231a06e.pth"

train_cfg = dict(max_epochs=6)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4),
    paramwise_cfg=dict(custom_keys={".pair.weight": dict(lr_mult=10)}),
    clip_grad=dict(max_norm=35, norm_type=2),
)
param_scheduler = [dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500)]
finetune = dict(
    train_cfg=dict(max_epochs=24),
    optim_wrapper=dict(optimizer=dict(lr=2e-3), paramwise_cfg=None),
    param_scheduler=_base_.param_scheduler,
)
randomness = dict(seed=0)
