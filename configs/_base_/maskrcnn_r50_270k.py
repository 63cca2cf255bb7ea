# Mask R-CNN R50-FPN with a trainable SyncBN backbone and CHEX's published schedule: 270k iterations of 32 images on 8
# GPUs, biases at twice the learning rate and without weight decay. It was published with mixed precision: --amp.
_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(backbone=dict(frozen_stages=-1, norm_cfg=dict(type="SyncBN", requires_grad=True), norm_eval=False))
train_dataloader = dict(batch_size=4, sampler=dict(type="InfiniteSampler"))
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=270000, val_interval=10000)
optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=0.04, momentum=0.9, weight_decay=1e-4),
    paramwise_cfg=dict(bias_lr_mult=2.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1.0 / 3.0, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=270000, by_epoch=False, milestones=[210000, 250000], gamma=0.1),
]
auto_scale_lr = dict(base_batch_size=32)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=10000, max_keep_ckpts=3))
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
