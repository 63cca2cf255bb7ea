# SSD300 with a ResNet-50 cut after layer3, stride 1 there (38x38 features of 300x300 images), and CHEX's published
# schedule: 8 GPUs x 64, 650 epochs of COCO, 300 iterations of warm-up, no weight decay of norms and biases. It was
# published with mixed precision: --amp.
_base_ = "mmdet::ssd/ssd300_coco.py"
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(std=[58.395, 57.12, 57.375]),
    backbone=dict(
        _delete_=True,
        type="ResNet",
        depth=50,
        num_stages=3,
        strides=(1, 2, 1),
        dilations=(1, 1, 1),
        out_indices=(2,),
        frozen_stages=-1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,
        style="pytorch",
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
    neck=dict(
        in_channels=(1024,),
        out_channels=(1024, 512, 512, 256, 256, 256),
        level_strides=(2, 2, 2, 1, 1),
        level_paddings=(1, 1, 1, 0, 0),
        l2_norm_scale=None,
    ),
    bbox_head=dict(in_channels=(1024, 512, 512, 256, 256, 256)),
)
train_dataloader = dict(
    batch_size=64,
    num_workers=4,
    dataset=dict(
        _delete_=True,
        type="CocoDataset",
        data_root="data/coco/",
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=_base_.train_pipeline,
    ),
)
train_cfg = dict(max_epochs=650, val_interval=10)
optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=2.6e-3 * 8 * 64 / 32, momentum=0.9, weight_decay=5e-4),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=300),
    dict(type="MultiStepLR", begin=0, end=650, by_epoch=True, milestones=[430, 540], gamma=0.1),
]
auto_scale_lr = dict(base_batch_size=512)
default_hooks = dict(checkpoint=dict(interval=10, max_keep_ckpts=3))
randomness = dict(seed=0)
