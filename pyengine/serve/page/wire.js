// The binary message of the live socket, as wire.py has it: 32 bytes, little endian, then the payload.

export const KIND = { frame: 1, snapshot: 2 };
export const CODEC = { jpeg: 1, webp: 2, raw: 3 };
const MIME = { 1: "image/jpeg", 2: "image/webp" };

export function read(buffer) {
  const head = new DataView(buffer);
  if (head.getUint32(0) !== 0x50594531) throw new Error("not a pyengine message");
  return {
    kind: head.getUint8(4),
    flags: head.getUint8(5),
    codec: head.getUint16(6, true),
    frame: Number(head.getBigUint64(8, true)),
    epoch: head.getUint32(16, true),
    events: head.getUint32(20, true),
    width: head.getUint16(24, true),
    height: head.getUint16(26, true),
    payload: new Uint8Array(buffer, 32),
  };
}

// A picture that drawImage takes.
export async function picture(message) {
  if (message.codec !== CODEC.raw) return createImageBitmap(new Blob([message.payload], { type: MIME[message.codec] }));
  const { width, height, payload } = message;
  const rgba = new Uint8ClampedArray(width * height * 4).fill(255);
  for (let from = 0, to = 0; from < payload.length; from += 3, to += 4) rgba.set(payload.subarray(from, from + 3), to);
  return createImageBitmap(new ImageData(rgba, width, height));
}
