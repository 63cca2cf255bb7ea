# ResNet-56 for 32x32 images, of half width. So deep a network learns little in the first ten epochs: it has 60 in all,
# at twice the learning rate.
_base_ = "./digits_resnet20.py"

model = dict(backbone=dict(depth=56))
train_cfg = dict(max_epochs=60, val_interval=60)
optim_wrapper = dict(optimizer=dict(lr=0.1))
whole = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(type="CosineAnnealingLR", eta_min=1e-4, by_epoch=True, convert_to_iter_based=True, end=60, T_max=60),
]
half = dict(
    train_cfg=dict(max_epochs=30, val_interval=30),
    param_scheduler=[
        dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=20),
        dict(type="CosineAnnealingLR", eta_min=1e-4, by_epoch=True, convert_to_iter_based=True, end=30, T_max=30),
    ],
)
param_scheduler = whole
