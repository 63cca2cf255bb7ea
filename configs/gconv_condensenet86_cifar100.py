# GConv Prune on CondenseNet-86, CIFAR-100, as published: the same as on CIFAR-10.
_base_ = "./gconv_condensenet86_cifar10.py"

model = dict(model=dict(head=dict(num_classes=100)))
data_preprocessor = dict(num_classes=100)
train_dataloader = dict(dataset=dict(type="CIFAR100", data_root="data/cifar100"))
val_dataloader = dict(dataset=dict(type="CIFAR100", data_root="data/cifar100"))
test_dataloader = val_dataloader
