# What the detectors start from, as others start from ImageNet: a backbone of a quarter of the usual width, taught to
# tell six shapes apart, one in an image of 32x32. It knows neither boxes nor clutter. Narrow ones need time: after
# eight epochs it told 78 of 100 shapes apart instead of 99, and random channels at 25 % ended at a box AP of 28 instead
# of 51 (Mask R-CNN, validation split, a stem of 16).
_base_ = "../_base_/demo_resnet18.py"

model = dict(backbone=dict(stem_channels=8, base_channels=16), head=dict(in_channels=128))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomCrop", crop_size=32, padding=4, padding_mode="reflect"),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PackInputs"),
]
shapes = dict(data_root="data/shapes_single", make=dict(train_per_class=1000, val_per_class=50, size=32))
train_dataloader = dict(batch_size=32, dataset=dict(shapes, pipeline=train_pipeline))
val_dataloader = dict(dataset=shapes)
test_dataloader = dict(dataset=shapes)
train_cfg = dict(max_epochs=24, val_interval=24)
optim_wrapper = dict(optimizer=dict(fused=True))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=40),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, begin=0, end=24, T_max=24),
]
