# PreResNet-164 of gumi: bare 1x1 convolutions as projections.
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    backbone=dict(type="prune_mm.PreResNet", depth=164),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=256, loss=dict(type="CrossEntropyLoss")),
)
