# The topology of CondenseNet-86, as gumi prunes it: dense convolutions, transitions that only pool.
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="prune_mm.CIFARDenseNet",
        depth=86,
        growth=(8, 16, 32),
        bottleneck=True,
        transition="pool",
        stem_channels=16,
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=800, loss=dict(type="CrossEntropyLoss")),
)
