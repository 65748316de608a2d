"""A plan and its parts in an object store, for machines that share no disk: ``s3://``, ``gs://``, what fsspec takes.

    ADDRESS/plan.json           the plan
    ADDRESS/parts/000007.tar    part 7, packed

Object stores write a file at once or not at all, and one that is damaged all the same is found by its hashes. There
are no leases: two machines that make one part write the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qdeploy.parts.folder import PLAN
from qdeploy.system.errors import CapabilityError, InvalidInputError, QDeployError, UsageError


def is_address(plan: str | Path) -> bool:
    """Whether a plan is named by an address, as ``s3://bucket/job``, and not by a folder."""
    return isinstance(plan, str) and "://" in plan


class ObjectStore:
    """What lies below one address.

    Args:
        address: ``s3://bucket/job`` and the like.

    Raises:
        UsageError: there is no such kind of address.
        CapabilityError: the package for it is not installed.
    """

    def __init__(self, address: str) -> None:
        from fsspec.core import url_to_fs

        self.address = address.rstrip("/")
        try:
            self._files, root = url_to_fs(self.address, use_listings_cache=False)
        except ImportError as error:
            raise CapabilityError(f"{address} needs a package that is not installed: {error}") from error
        except ValueError as error:
            raise UsageError(f"{address} is no address of an object store: {error}") from error
        self._root = str(root).rstrip("/")

    def publish(self, plan: Path) -> None:
        """Copy a plan there.

        Args:
            plan: its folder.

        Raises:
            UsageError: another plan is there.
            CapabilityError: the store cannot be used.
        """
        text, place = (plan / PLAN).read_bytes(), f"{self._root}/{PLAN}"
        with self._explained():
            if self._files.exists(place):
                if self._files.cat_file(place) != text:
                    raise UsageError(f"{self.address} holds another plan: choose another address")
                return
            self._files.makedirs(f"{self._root}/parts", exist_ok=True)
            self._files.pipe_file(place, text)

    def fetch(self, folder: Path) -> None:
        """Copy the plan from there into a folder.

        Raises:
            InvalidInputError: there is none.
            CapabilityError: the store cannot be used.
        """
        with self._explained():
            try:
                text = self._files.cat_file(f"{self._root}/{PLAN}")
            except FileNotFoundError as error:
                raise InvalidInputError(
                    f"{self.address} holds no plan: `qdeploy work PLAN --publish {self.address}` puts it there"
                ) from error
        (folder / PLAN).write_bytes(text)

    def there(self) -> set[int]:
        """Numbers of the parts that are there."""
        with self._explained():
            try:
                found = self._files.ls(f"{self._root}/parts", detail=False)
            except FileNotFoundError:  # a store without folders
                return set()
        stems = (Path(str(name)).stem for name in found if str(name).endswith(".tar"))
        return {int(stem) for stem in stems if stem.isdecimal()}

    def has(self, number: int) -> bool:
        """Whether a part is there."""
        with self._explained():
            return bool(self._files.exists(self._part(number)))

    def put(self, number: int, packed: bytes) -> None:
        """Write a part (`qdeploy.parts.packed.pack`)."""
        with self._explained():
            self._files.pipe_file(self._part(number), packed)

    def get(self, number: int) -> BinaryIO:
        """A packed part."""
        with self._explained():
            return io.BytesIO(self._files.cat_file(self._part(number)))

    def remove(self, number: int) -> None:
        """Remove a part that is damaged."""
        with self._explained():
            self._files.rm_file(self._part(number))

    def clear(self) -> None:
        """Remove plan and parts, and nothing else that lies there: the result is there."""
        parts = [self._part(number) for number in sorted(self.there())]
        with self._explained():
            self._files.rm([*parts, f"{self._root}/{PLAN}"])

    def _part(self, number: int) -> str:
        return f"{self._root}/parts/{number:06d}.tar"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Each kind of store has errors of its own; all of them are one sentence."""
        try:
            yield
        except (QDeployError, FileNotFoundError):
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CapabilityError(f"{self.address} cannot be used: {reason}") from error
