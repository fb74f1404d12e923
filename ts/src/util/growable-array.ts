/** Numbers one after the other, without an object each; 8 bytes and as much room again while it grows. */
export class Numbers {
  private room = new Float64Array(1024)
  private count = 0
  push(x: number): void {
    if (this.count === this.room.length) {
      const bigger = new Float64Array(2 * this.count)
      bigger.set(this.room)
      this.room = bigger
    }
    this.room[this.count++] = x
  }
  /** What was pushed; valid until the next push. */
  get values(): Float64Array {
    return this.room.subarray(0, this.count)
  }
}
