# VGG-16 with batch norm and one linear layer.
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    backbone=dict(type="prune_mm.CIFARVGG", depth=16),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=512, loss=dict(type="CrossEntropyLoss")),
)
