# A backbone of half the usual width, taught to tell six shapes apart, one in an image of 32x32. It knows neither boxes
# nor clutter.
_base_ = "../_base_/demo_resnet18.py"

model = dict(backbone=dict(stem_channels=32, base_channels=32), head=dict(in_channels=256))
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
train_cfg = dict(max_epochs=8, val_interval=8)
optim_wrapper = dict(optimizer=dict(fused=True))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=40),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, begin=0, end=8, T_max=8),
]
