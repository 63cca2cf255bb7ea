# CIFAR-10: crops of images padded by 4, flips; 128 images to train, 100 to test. With MMPretrain's default runtime.
_base_ = ["mmpretrain::_base_/datasets/cifar10_bs16.py", "mmpretrain::_base_/default_runtime.py"]

train_dataloader = dict(batch_size=128, persistent_workers=True)
val_dataloader = dict(batch_size=100, persistent_workers=True)
test_dataloader = val_dataloader
