// Files become pictures: upright, within the server's limits, with the size that the server will see.

const SENT_AS_THEY_ARE = ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"];

/** Why a file cannot be used; `key` and `values` are those of its message. */
export class PictureError extends Error {
  constructor(key, values) {
    super(key);
    this.key = key;
    this.values = values;
  }
}

/** Read a file. Returns { name, blob, url, width, height, notices }; notices are [key, values] of messages. */
export async function readPicture(file, limits) {
  const name = file.name || "clipboard.png";
  if (file.size === 0) throw new PictureError("emptyFile", { name });
  if (file.type && !file.type.startsWith("image/")) throw new PictureError("notPicture", { name });
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new PictureError("unreadable", { name });
  });
  try {
    const notices = file.type === "image/gif" ? [["firstFrame", { name }]] : [];
    const scale = fit(bitmap, file.size, limits);
    const turned = orientation(new Uint8Array(await file.arrayBuffer())) !== 1;
    let blob = file;
    const width = Math.max(1, Math.round(bitmap.width * scale));
    const height = Math.max(1, Math.round(bitmap.height * scale));
    if (scale < 1) notices.push(["resized", { name, width, height }]);
    else if (turned) notices.push(["upright", { name }]);
    if (scale < 1 || turned || !SENT_AS_THEY_ARE.includes(file.type)) {
      blob = await encode(bitmap, width, height, file.type === "image/jpeg" ? file.type : "image/png");
    }
    return { name, blob, url: URL.createObjectURL(blob), width, height, notices };
  } finally {
    bitmap.close();
  }
}

/** The picture as a data URL; kept, since every later question sends it again. */
export async function dataUrl(picture) {
  picture.dataUrl ??= await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(picture.blob);
  });
  return picture.dataUrl;
}

/** Give back what a picture holds. */
export function release(picture) {
  URL.revokeObjectURL(picture.url);
}

/** Draw a bitmap at a size and encode it. */
export async function encode(bitmap, width, height, type) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  return new Promise((resolve) => canvas.toBlob(resolve, type, 0.95));
}

/** The factor, 1 or less, that brings a picture within the limits on sides, pixels and bytes. */
function fit({ width, height }, bytes, limits) {
  if (!limits) return 1;
  const pixels = Math.min(limits.max_image_pixels ?? Infinity, limits.max_request_pixels ?? Infinity);
  const side = limits.max_image_side ?? Infinity;
  const scale = Math.min(1, side / width, side / height, Math.sqrt(pixels / (width * height)));
  return bytes > (limits.max_image_bytes ?? Infinity) ? Math.min(scale, 2048 / Math.max(width, height, 2049)) : scale;
}

/** The Exif orientation, 1 to 8; 1 is upright, and what a file without one has. */
export function orientation(bytes) {
  const at = tiffHeader(bytes);
  if (at < 0) return 1;
  const view = new DataView(bytes.buffer, bytes.byteOffset + at, bytes.byteLength - at);
  const little = view.getUint8(0) === 0x49;
  try {
    const directory = view.getUint32(4, little);
    for (let entry = 0; entry < view.getUint16(directory, little); entry++) {
      const start = directory + 2 + 12 * entry;
      if (view.getUint16(start, little) === 0x0112) return view.getUint16(start + 8, little) || 1;
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // the file ends inside its directory
  }
  return 1;
}

/** Where the header of Exif data is in a JPEG, PNG or WebP file; -1 where there is none. */
function tiffHeader(bytes) {
  for (let at = 4; at + 8 < bytes.length; at++) {
    const little = bytes[at] === 0x49 && bytes[at + 1] === 0x49 && bytes[at + 2] === 0x2a && bytes[at + 3] === 0;
    const big = bytes[at] === 0x4d && bytes[at + 1] === 0x4d && bytes[at + 2] === 0 && bytes[at + 3] === 0x2a;
    if (!little && !big) continue;
    const before = String.fromCharCode(...bytes.subarray(Math.max(0, at - 8), at));
    if (/Exif\0\0$|eXIf$|EXIF.{4}$/s.test(before)) return at;
  }
  return -1;
}
