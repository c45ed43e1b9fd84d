"""Packaging of `accessory`. `constraints.txt` pins the versions that are tested; the ranges here say what it can work with.

pip install torch==2.13.0                                   first and by itself, CPU or CUDA as you like (any torch >= 2.11)
pip install setuptools                                      fairscale is a source package and builds with the setuptools you have
pip install --no-build-isolation -c constraints.txt -e ".[hf,gguf,tensorboard]"
"""

from setuptools import find_packages, setup

HF = ["tokenizers", "tiktoken", "jinja2"]
GGUF = ["gguf", "tokenizers"]
TENSORBOARD = ["tensorboard"]
CORPUS = ["pyarrow", "zstandard"]
PLOT = ["matplotlib"]
TEST = ["pytest", "pytest-timeout", "pytest-xdist", "ruff", "hypothesis", "psutil", "transformers", "peft", "xllamacpp"]

setup(
    name="accessory",
    version="0.1.0",
    description="Fine-tune LLaMA-family models from the checkpoint you have: one handwritten LLaMA, tensor parallel, "
    "FSDP, LoRA.",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["accessory", "accessory.*"]),
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "fairscale==0.4.13",
        "sentencepiece",
        "numpy",
        "fire",
        "safetensors",
        "PyYAML",
        "tqdm",
    ],
    extras_require={
        "hf": HF,
        "gguf": GGUF,
        "tensorboard": TENSORBOARD,
        "corpus": CORPUS,
        "plot": PLOT,
        "test": sorted({*HF, *GGUF, *TENSORBOARD, *CORPUS, *PLOT, *TEST}),
    },
)
