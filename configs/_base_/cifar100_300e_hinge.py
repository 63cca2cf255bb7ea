# CIFAR-100 with Hinge's published recipe: the same as on CIFAR-10.
_base_ = "./cifar10_300e_hinge.py"

data_preprocessor = dict(num_classes=100)
train_dataloader = dict(dataset=dict(type="CIFAR100", data_root="data/cifar100"))
val_dataloader = dict(dataset=dict(type="CIFAR100", data_root="data/cifar100"))
test_dataloader = val_dataloader
