# CIFAR-100, normalised like CIFAR-10 (as published): 128 images to train, 100 to test.
_base_ = "./cifar10_bs128.py"

data_preprocessor = dict(num_classes=100)
train_dataloader = dict(dataset=dict(type="CIFAR100", data_root="data/cifar100"))
val_dataloader = dict(dataset=dict(type="CIFAR100", data_root="data/cifar100"))
test_dataloader = val_dataloader
