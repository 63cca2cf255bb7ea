# ImageNet with 1xN's published recipe: a trained network with masks trains on for 180 epochs, 256 images at a time; SGD
# with weight decay everywhere, linear warm-up over 5 epochs by iteration, then cosine by epoch. (The published cosine
# already counts during the warm-up, which makes 0.2 % of the learning rate there.)
_base_ = ["mmpretrain::_base_/datasets/imagenet_bs32.py", "mmpretrain::_base_/default_runtime.py"]

train_dataloader = dict(batch_size=256)
val_dataloader = dict(batch_size=256)
test_dataloader = dict(batch_size=256)
val_cfg = dict()
test_cfg = dict()

train_cfg = dict(by_epoch=True, max_epochs=180, val_interval=1)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=4e-5))
param_scheduler = [
    dict(type="LinearLR", start_factor=1 / 25025, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=5, end=180, T_max=175),
]
auto_scale_lr = dict(base_batch_size=256)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=3))
randomness = dict(seed=0)
