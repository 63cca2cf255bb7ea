# A small SSD (ResNet-18 of a quarter of its width, cut after layer3, stride 1 there) on the images of the Mask R-CNN.
# Every row trains for 20 epochs in all.
_base_ = "../../_base_/demo_ssd_r18.py"

classes = ("circle", "cross", "square", "triangle")
shapes = dict(
    data_root="data/shapes_once",
    make=dict(
        train=5600,
        val=150,
        test=300,
        size=96,
        max_objects=3,
        classes=classes,
        clutter=1,
        occluders=1,
        occlusion=0.3,
        min_radius=7.0,
    ),
)
starts_from = "shapes_backbone_narrow"
model = dict(
    backbone=dict(
        stem_channels=8,
        base_channels=16,
        init_cfg=dict(type="Pretrained", prefix="backbone.", checkpoint="{{backbone}}"),
    ),
    neck=dict(in_channels=(64,), out_channels=(64, 64, 64, 32)),
    bbox_head=dict(
        in_channels=(64, 64, 64, 32),
        num_classes=4,
        anchor_generator=dict(input_size=96, min_sizes=[16, 26, 40, 58], max_sizes=[26, 40, 58, 80]),
    ),
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(96, 96), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
# An epoch is a twentieth of the images: none comes twice. A training behind another one starts behind its images.
sampler = dict(_delete_=True, type="prune_mm.PartSampler", size=280)
train_dataloader = dict(batch_size=4, sampler=sampler, dataset=shapes)
val_dataloader = dict(batch_size=25, dataset=dict(shapes, pipeline=test_pipeline))
test_dataloader = dict(
    batch_size=25,
    dataset=dict(
        shapes,
        pipeline=test_pipeline,
        ann_file="annotations/instances_test2017.json",
        data_prefix=dict(img="test2017/"),
    ),
)
val_evaluator = dict(ann_file="data/shapes_once/annotations/instances_val2017.json")
test_evaluator = dict(ann_file="data/shapes_once/annotations/instances_test2017.json")

train_cfg = dict(max_epochs=20, val_interval=20)
optim_wrapper = dict(optimizer=dict(lr=2e-3, fused=True))
# Every row has a constant learning rate in the first half, and one cycle in the second, as Mask R-CNN has. For a
# network that is pruned between them, "start" is the first half and "half" the learning rates of the second.
whole = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=70),
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=700, end=770),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, begin=10, end=20, T_max=10),
]
start = dict(train_cfg=dict(max_epochs=10, val_interval=10), param_scheduler=whole[:1])
half = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=70),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, end=10, T_max=10),
]
param_scheduler = whole
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=5, max_keep_ckpts=1))
log_processor = dict(window_size=10)
# Models right after their cut are tested with this seed only: that takes longer than a tenth of a training.
cut_seeds = [0]
